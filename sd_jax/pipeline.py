"""From prompts to pictures: pure functions over (sd, params, plan, arrays), and ``Pipeline``, which calls them for you.

prompt -> tokens -> context -> latents -> scan -> image. The pure functions are undecorated: the same under jit, pmap,
vmap and grad, with ``sd`` and ``size`` static and everything else data. They take and return float images in [-1, 1].
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from sd_jax import checks
from sd_jax import images as im
from sd_jax.config import NoiseConfig, SDConfig
from sd_jax.diffusion import draws, schedule
from sd_jax.diffusion.edits import Inpaint, composite
from sd_jax.diffusion.guidance import denoiser
from sd_jax.diffusion.samplers import Progress, make_sampler, sample
from sd_jax.models.clip import CLIPText
from sd_jax.models.unet import UNet
from sd_jax.models.vae import VAE
from sd_jax.progress import Bar
from sd_jax.tokenizer import Tokenizer, TruncationWarning
from sd_jax.types import Array, AttnEdit, LatentEdit, Params, RequestError, Sampler, Step
from sd_jax.weights.parameters import DTYPES
from sd_jax.weights.source import Report, open_source

# ---- the pure functions --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SD:
    """A model without its parameters: hashable, so that it can be a static argument."""

    config: SDConfig
    dtype: str = "float32"  # of the computation; parameters keep their own
    remat: bool = False  # recompute UNet blocks in a backward pass, for memory

    @property
    def clip(self) -> CLIPText:
        return CLIPText(self.config.clip, jnp.dtype(self.dtype))

    @property
    def unet(self) -> UNet:
        return UNet(self.config.unet, jnp.dtype(self.dtype), self.remat)

    @property
    def vae(self) -> VAE:
        return VAE(self.config.vae, jnp.dtype(self.dtype))


@flax.struct.dataclass
class Plan:
    """How to sample: data all of it, but for the sampler's kind and the number of rows. Made by ``make_plan``."""

    sampler: Sampler
    steps: Step
    scale: Array  # of the unit-normal noise that a picture from nothing starts from


def make_plan(
    noise: NoiseConfig,
    steps: int = 50,
    sampler: str | Sampler | None = None,
    spacing: str | None = None,
    eta: float = 0.0,
    strength: float = 1.0,
) -> Plan:
    """Lay the time grid out, on the host. ``strength`` below 1 leaves the first steps out.

    ``sampler`` is a name of SAMPLERS or a sampler itself (which has its own ``eta``); None is the checkpoint's own, and
    so is a ``spacing`` of None. Raises RequestError for what no grid or sampler allows.
    """
    if not (math.isfinite(eta) and 0 <= eta <= 1):
        raise RequestError(f"eta {eta} is out of range; give 0 (deterministic) to 1")
    chosen = noise.sampler if sampler is None else sampler
    if isinstance(chosen, str):
        chosen = make_sampler(chosen, np.float32(eta))
    elif isinstance(chosen, type) or not (hasattr(chosen, "init") and hasattr(chosen, "step")):
        raise RequestError(f"sampler {chosen!r} is no sampler; give a name, or an object with init and step: DDIM()")
    elif eta != 0:
        raise RequestError(f"eta {eta} is for the name 'ddim', and the sampler given is {chosen!r}; set its own eta")
    start = schedule.start_at(steps, strength)
    grid = schedule.time_grid(noise, steps, chosen, spacing, start=start)
    scale = schedule.start_scale(noise, grid, chosen, spacing)
    return Plan(chosen, grid, np.asarray(scale, np.float32))


def text_to_image(
    sd: SD,
    params: Params,
    plan: Plan,
    tokens: Array,
    seeds: Array,
    guidance: Array,
    *,
    size: tuple[int, int],
    rescale: Array | None = None,
    latents: Array | None = None,
    attn_edit: AttnEdit | None = None,
    latent_edit: LatentEdit | None = None,
    on_step: Callable[[Any], None] | None = None,
) -> Array:
    """Pictures of prompts: float32 [B, height, width, 3], about [-1, 1] and not clipped.

    Args:
      tokens: int32 [B, P, n, 77]; P is 2 (the negative or empty prompt, then the prompt), or 1 to run without
        guidance. n chunks of a long prompt are joined along the context.
      seeds: uint32 [B, 2], ``draws.seed_words`` of the images' seeds.
      guidance: float32 [B] (Ho & Salimans 2022); ``rescale`` [B] as in ``guidance.combine``.
      size: (height, width) in pixels, static.
      latents: [B, h, w, C] to start from instead of the seeds' unit-normal noise.
      attn_edit, latent_edit, on_step: see ``types`` and ``samplers.sample``.
    """
    noise = starting_latents(sd, seeds, size) if latents is None else latents
    denoise = make_denoise(sd, params, tokens, guidance, rescale=rescale, attn_edit=attn_edit)
    x = plan.scale * noise
    x, _ = sample(plan.sampler, denoise, x, plan.steps, draws.keys(seeds), latent_edit, on_step=on_step)
    return decode(sd, params, x)


def image_to_image(
    sd: SD,
    params: Params,
    plan: Plan,
    tokens: Array,
    seeds: Array,
    guidance: Array,
    images: Array,
    *,
    rescale: Array | None = None,
    latents: Array | None = None,
    attn_edit: AttnEdit | None = None,
    latent_edit: LatentEdit | None = None,
    on_step: Callable[[Any], None] | None = None,
) -> Array:
    """Pictures of prompts, made from ``images`` [B,H,W,3] in [-1,1] noised to the plan's first level (Meng et al.
    2021).

    The rest as in ``text_to_image``; the plan comes from ``make_plan(..., strength=...)``.
    """
    noise = starting_latents(sd, seeds, images.shape[1:3]) if latents is None else latents
    x0 = encode_image(sd, params, images, seeds)
    denoise = make_denoise(sd, params, tokens, guidance, rescale=rescale, attn_edit=attn_edit)
    x = schedule.q_sample(x0, noise, plan.steps.alpha[0], plan.steps.sigma[0])
    x, _ = sample(plan.sampler, denoise, x, plan.steps, draws.keys(seeds), latent_edit, on_step=on_step)
    return decode(sd, params, x)


def inpaint(
    sd: SD,
    params: Params,
    plan: Plan,
    tokens: Array,
    seeds: Array,
    guidance: Array,
    images: Array,
    masks: Array,
    *,
    from_noise: bool = True,
    rescale: Array | None = None,
    latents: Array | None = None,
    attn_edit: AttnEdit | None = None,
    on_step: Callable[[Any], None] | None = None,
) -> Array:
    """Repaint ``images`` [B,H,W,3] in [-1,1] where ``masks`` [B,H,W] (uint8 or bool) are nonzero.

    A 4-channel UNet is held to the known latents after every step (``edits.Inpaint``); the 9-channel inpainting UNet is
    shown the mask and the masked image instead. ``from_noise`` (static) starts from noise alone, as strength 1 does in
    diffusers; otherwise from the noised image. The rest as in ``text_to_image``.
    """
    noise = starting_latents(sd, seeds, images.shape[1:3]) if latents is None else latents
    mask = im.to_mask(masks, sd.config.vae.factor)
    extra = edit = x0 = None
    shown = sd.config.unet.in_channels > sd.config.vae.latent_channels
    if shown:
        masked = images * (1 - im.to_mask(masks))
        extra = jnp.concatenate([mask, encode_image(sd, params, masked, seeds)], axis=-1)
    if not (shown and from_noise):
        x0 = encode_image(sd, params, images, seeds)
    if not shown:
        edit = Inpaint(mask, x0, noise)
    denoise = make_denoise(sd, params, tokens, guidance, rescale=rescale, attn_edit=attn_edit, extra=extra)
    x = plan.scale * noise
    if not from_noise:
        x = schedule.q_sample(x0, noise, plan.steps.alpha[0], plan.steps.sigma[0])
    x, _ = sample(plan.sampler, denoise, x, plan.steps, draws.keys(seeds), edit, on_step=on_step)
    return decode(sd, params, x if shown else composite(x, x0, mask))


def make_denoise(
    sd: SD,
    params: Params,
    tokens: Array,
    guidance: Array,
    *,
    rescale: Array | None = None,
    attn_edit: AttnEdit | None = None,
    extra: Array | None = None,
):
    """The ``Denoise`` of prompts: ``tokens`` [B, P, n, 77], ``guidance`` [B], ``extra`` [B, h, w, E] channels."""

    def net(x: Array, t: Array, context: Array, s: Step) -> tuple[Array, Any]:
        return sd.unet.apply({"params": params["unet"]}, x, t, context, attn_edit, s, mutable=["intermediates"])

    return denoiser(
        net,
        encode_tokens(sd, params, tokens),
        guidance,
        guided=tokens.shape[1] == 2,
        prediction=sd.config.noise.prediction,
        rescale=rescale,
        extra=extra,
    )


def encode_tokens(sd: SD, params: Params, tokens: Array) -> Array:
    """tokens int32 [..., n, 77] -> context [..., n*77, context_width]: each chunk is read on its own."""
    lead, (n, length) = tokens.shape[:-2], tokens.shape[-2:]
    context = sd.clip.apply({"params": params["clip"]}, tokens.reshape(-1, length))
    return context.reshape(*lead, n * length, context.shape[-1])


def encode_image(sd: SD, params: Params, images: Array, seeds: Array | None = None) -> Array:
    """[B,H,W,3] in [-1,1] -> scaled latents: the posterior's mean, or a draw of it with each image's own seed."""
    posterior = sd.vae.apply({"params": params["vae"]}, images, method="encode")
    if seeds is None:
        return posterior.mean
    return posterior.sample(draws.draw(draws.fold(draws.keys(seeds), draws.POSTERIOR), posterior.mean))


def decode(sd: SD, params: Params, latents: Array) -> Array:
    """Scaled latents [B,h,w,C] -> float32 [B,H,W,3], about [-1,1]."""
    return sd.vae.apply({"params": params["vae"]}, latents, method="decode")


def starting_latents(sd: SD, seeds: Array, size: tuple[int, int]) -> Array:
    """The unit-normal noise [B,h,w,C] that pictures of ``size`` pixels start from."""
    f = sd.config.vae.factor
    return draws.starting_noise(draws.keys(seeds), (size[0] // f, size[1] // f, sd.config.vae.latent_channels))


# ---- the object for notebooks --------------------------------------------------------------------------------------


def _jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """``jax.jit`` with the arguments that are structure made static."""
    names = inspect.signature(function).parameters
    static = [name for name in ("sd", "size", "from_noise", "on_step") if name in names]
    return jax.jit(function, static_argnames=static)


def _pixels(function: Callable[..., Array]) -> Callable[..., tuple[Array, Array]]:
    """``function`` jitted, and giving uint8 pixels and, for each image, whether all its values are finite."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        image = function(*args, **kwargs)
        return im.to_uint8(image), jnp.isfinite(image).all(axis=(1, 2, 3))

    return _jit(run)


RUN = {function.__name__: _pixels(function) for function in (text_to_image, image_to_image, inpaint)}
_encode_tokens, _encode_image, _decode = _jit(encode_tokens), _jit(encode_image), _jit(decode)


@functools.partial(jax.jit, static_argnames="sd")
def _unet(sd: SD, params: Params, latents: Array, t: Array, context: Array) -> Array:
    return sd.unet.apply({"params": params["unet"]}, latents, t, context)


class NotFinite(RuntimeError):
    """Some images came out with NaN or infinite values. ``images`` are all of them, ``bad`` the indices of those."""

    def __init__(self, message: str, images: np.ndarray, bad: list[int]):
        super().__init__(message)
        self.images, self.bad = images, bad


@dataclasses.dataclass(frozen=True)
class Options:
    """What can be asked of every picture, by keyword, with the defaults."""

    negative: str | Sequence[str] = ""  # what guidance leads away from: one text, or one per image
    seed: int = 0  # image i has the seed seed + i ...
    seeds: Sequence[int] | None = None  # ... or its own here; 0 to 2**63 - 1
    steps: int = 50
    # Classifier-free guidance; 1 throughout skips the negative pass. None is the checkpoint's own, 7.5 for v1-4.
    guidance: float | Sequence[float] | None = None
    sampler: str | Sampler | None = None  # a name of SAMPLERS, or a sampler itself; None is the checkpoint's own
    spacing: str | None = None  # a name of SPACINGS; None is the checkpoint's own, or the sampler's
    eta: float = 0.0  # noise of the ddim sampler, 0 to 1
    latents: Array | None = None  # unit-normal [B, height/8, width/8, 4] to start from instead of the seeds' noise
    rescale: float | Sequence[float] = 0.0  # phi of Lin et al. 2023, against over-exposure; 0 is off
    long_prompt: str = "truncate"  # (with a warning), "error" or "chunk"
    attn_edit: AttnEdit | None = None
    # Told (evaluations done, evaluations in all) as work goes on. True is a bar on stderr, False none, and None one
    # where a step takes seconds: JAX does not keep the compiled programs of runs that tell.
    progress: Callable[[int, int], None] | bool | None = None

    def resolved(self, noise: NoiseConfig) -> Options:
        """With the checkpoint's own sampler and guidance where none was asked for."""
        own = {"sampler": noise.sampler, "guidance": noise.guidance}
        return dataclasses.replace(self, **{name: v for name, v in own.items() if getattr(self, name) is None})


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """A model with its parameters and tokenizer. Methods check the request, encode it, and call the pure functions.

    Changing prompts, negatives, seeds, guidance (but for the step from and to 1), eta, images or masks compiles
    nothing. Sizes, batch size, the number of steps and the sampler do; and, once each way, whether there are
    ``latents``, ``rescale``, an edit, ``progress``, or more chunks of a prompt.
    """

    sd: SD
    params: Params
    tokenizer: Tokenizer
    report: Report | None = None  # where the weights came from
    _progress: Progress = dataclasses.field(default_factory=Progress, repr=False)

    @property
    def is_slow(self) -> bool:
        """Whether a step takes seconds: a network of v1's size on a CPU. Compiling anew is little beside that."""
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params.get("unet")))
        return jax.default_backend() == "cpu" and count > 1e8

    def text_to_image(
        self, prompts: str | Sequence[str], *, height: int | None = None, width: int | None = None, **options: Any
    ) -> np.ndarray:
        """Pictures of ``prompts``, uint8 [B, height, width, 3].

        Args:
          prompts: a text, or one per image.
          height, width: pixels, multiples of the autoencoder's factor (8); the model's own size by default.
          options: those of ``Options``, with its defaults.

        Raises:
          RequestError: before anything is compiled. NotFinite: some images are NaN or infinite.
        """
        return self._run("text_to_image", prompts, Options(**options), size=(height, width))

    def image_to_image(
        self, prompts: str | Sequence[str], images: np.ndarray, *, strength: float = 0.8, **options: Any
    ) -> np.ndarray:
        """Pictures of ``prompts`` made from ``images``, uint8 [B,H,W,3] or one [H,W,3]; the rest as ``text_to_image``.

        ``strength``, above 0 and up to 1, is how much is made anew: ``int(steps * strength)`` steps are run.
        """
        images = checks.as_images(images, self.sd.config.vae.factor)
        return self._run("image_to_image", prompts, Options(**options), strength, {"images": images})

    def inpaint(
        self,
        prompts: str | Sequence[str],
        images: np.ndarray,
        masks: np.ndarray,
        *,
        strength: float = 1.0,
        **options: Any,
    ) -> np.ndarray:
        """Repaint ``images`` (uint8 [B,H,W,3] or [H,W,3]) where ``masks`` (uint8 or bool, [B,H,W] or [H,W]) are
        nonzero.

        Works with any v1 model, and with the 9-channel inpainting model. The rest as in ``image_to_image``.
        """
        images, masks = checks.as_images(images, self.sd.config.vae.factor), checks.as_masks(masks)
        if masks.shape[1:] != images.shape[1:3]:
            raise RequestError(
                f"masks are {masks.shape[1]}x{masks.shape[2]} and images {images.shape[1]}x{images.shape[2]} "
                "(height x width); give both the same size"
            )
        pictures = {"images": images, "masks": masks}
        return self._run("inpaint", prompts, Options(**options), strength, pictures, from_noise=strength == 1.0)

    def encode_prompt(self, prompts: str | Sequence[str], *, long_prompt: str = "truncate") -> Array:
        """Context [B, 77, D] of prompts ([B, n*77, D] for "chunk")."""
        return _encode_tokens(self.sd, self.params, self._tokens(prompts, long_prompt))

    def unet(self, latents: Array, t: Array | float, context: Array) -> Array:
        """The network's prediction, float32 [B,h,w,C], at timestep ``t`` (a number or [B])."""
        return _unet(self.sd, self.params, latents, jnp.asarray(t, jnp.float32), context)

    def encode_image(self, image: np.ndarray) -> Array:
        """uint8 [B,H,W,3] (or float in [-1,1]) -> scaled latents [B,h,w,C], the posterior's mean."""
        image = np.asarray(image)
        floats = jnp.issubdtype(image.dtype, jnp.floating)
        image = checks.as_images(image, self.sd.config.vae.factor, floats=floats)
        image = image if floats else im.from_uint8(image)
        return _encode_image(self.sd, self.params, image)

    def decode(self, latents: Array) -> Array:
        """Scaled latents [B,h,w,C] -> float32 images [B,H,W,3] in about [-1,1]; ``images.to_uint8`` makes pixels."""
        channels = self.sd.config.vae.latent_channels
        if jnp.ndim(latents) != 4 or jnp.shape(latents)[-1] != channels:
            raise RequestError(f"latents are {list(jnp.shape(latents))}; give [B, h, w, {channels}]")
        return _decode(self.sd, self.params, latents)

    def _run(
        self,
        name: str,
        prompts: str | Sequence[str],
        o: Options,
        strength: float = 1.0,
        pictures: dict[str, np.ndarray] | None = None,
        **static: Any,
    ) -> np.ndarray:
        """Check the request, make every argument an array with a row per image, and run the jitted ``name``."""
        c = self.sd.config
        if name != "inpaint" and c.unet.in_channels != c.vae.latent_channels:
            raise RequestError(
                f"this is the inpainting model, whose UNet has {c.unet.in_channels} input channels; use inpaint, or "
                f"load a model of {c.vae.latent_channels}"
            )
        o = o.resolved(c.noise)
        plan = make_plan(c.noise, o.steps, o.sampler, o.spacing, o.eta, strength)
        pictures = pictures or {}
        prompts = checks.listed(prompts, "prompts")
        seeds = [None] if o.seeds is None else checks.listed(o.seeds, "seeds")
        b = max(len(prompts), len(seeds), *(len(values) for values in pictures.values()), 1)
        rows: dict[str, Any] = {name: checks.stack(values, b, name) for name, values in pictures.items()}
        if "images" in rows:
            rows["images"] = im.from_uint8(rows["images"])
        if o.latents is not None:
            size = rows["images"].shape[1:3] if "images" in rows else None
            rows["latents"] = checks.as_latents(o.latents, b, c.vae.factor, c.vae.latent_channels, size)
        if "size" in static:
            static["size"] = self._size(*static["size"], rows.get("latents"))
        seeds = [o.seed + i for i in range(b)] if o.seeds is None else checks.spread(seeds, b, "seeds")
        rows["seeds"] = draws.seed_words(seeds)
        rows["guidance"] = checks.numbers(o.guidance, b, "guidance", -math.inf, math.inf)
        rescale = checks.numbers(o.rescale, b, "rescale", 0.0, 1.0)
        guided = bool((rows["guidance"] != 1).any())
        if guided and rescale.any():
            rows["rescale"] = rescale
        rows["tokens"] = self._pairs(prompts, o.negative, b, guided, o.long_prompt)

        on_step, tell = None, self.is_slow if o.progress is None else o.progress
        if tell:
            tell, total = Bar() if tell is True else tell, len(plan.steps.i)
            self._progress.listener = lambda row: tell(row + 1, total)
            on_step = self._progress
        pixels, finite = RUN[name](self.sd, self.params, plan, attn_edit=o.attn_edit, on_step=on_step, **rows, **static)
        pixels = np.asarray(pixels)
        jax.effects_barrier()
        bad = [int(i) for i in np.flatnonzero(~np.asarray(finite))]
        if bad:
            raise NotFinite(
                f"{len(bad)} of {b} images came out with NaN or infinite values (seeds "
                f"{', '.join(str(seeds[i]) for i in bad)}); try float32, a lower guidance, or check the weights",
                pixels,
                bad,
            )
        return pixels

    def _pairs(
        self, prompts: list[str], negative: str | Sequence[str], b: int, guided: bool, long_prompt: str
    ) -> np.ndarray:
        """Tokens [b, 2, n, 77] of (negative, prompt), or [b, 1, n, 77] without guidance."""
        sides = {"prompt": prompts}
        if guided:
            sides = {"negative prompt": checks.listed(negative, "negative prompts"), **sides}
        tokens = []
        for name, texts in sides.items():
            # The warning is for the caller of text_to_image or its siblings.
            tokens.append(checks.stack(self._tokens(texts, long_prompt, name, stacklevel=5), b, f"{name}s"))
        n = max(side.shape[1] for side in tokens)
        empty = self.tokenizer.encode("").tokens  # [1, 1, 77], the chunks that the shorter side is filled up with
        return np.stack([np.concatenate([side, np.tile(empty, (b, n - side.shape[1], 1))], 1) for side in tokens], 1)

    def _tokens(
        self, prompts: str | Sequence[str], long_prompt: str, name: str = "prompt", stacklevel: int = 3
    ) -> np.ndarray:
        encoding = self.tokenizer.encode(prompts, long_prompt=long_prompt, name=name)
        for sentence in encoding.warnings():
            warnings.warn(sentence, TruncationWarning, stacklevel)
        return encoding.tokens

    def _size(self, height: int | None, width: int | None, latents: np.ndarray | None) -> tuple[int, int]:
        f = self.sd.config.vae.factor
        own = (self.sd.config.default_size,) * 2 if latents is None else tuple(f * side for side in latents.shape[1:3])
        size = (own[0] if height is None else height, own[1] if width is None else width)
        checks.side("height", size[0], f)
        checks.side("width", size[1], f)
        if latents is not None and size != own:
            raise RequestError(f"latents are those of a {own[0]}x{own[1]} picture; leave height and width out")
        return size


# ---- loading -------------------------------------------------------------------------------------------------------


class LicenceNotice(UserWarning):
    """What users of released v1 weights are to be told."""


def load(
    source: str | Path = "tiny",
    *,
    dtype: str | None = None,
    revision: str | None = None,
    ema: bool | None = None,
    variant: str | None = None,
    tokenizer: Tokenizer | str | Path | None = None,
    config: SDConfig | str | Path | None = None,
    parts: Mapping[str, str | Path] | None = None,
    verify: bool = True,
) -> Pipeline:
    """A ready ``Pipeline``.

    Args:
      source: "tiny" (the embedded model), a hub id such as "CompVis/stable-diffusion-v1-4", a diffusers folder, or a
        .ckpt or .safetensors file. A single CompVis file is taken as v1-4-shaped unless ``config`` says otherwise.
      dtype: of the computation; None is bfloat16 on a TPU or GPU and float32 on a CPU. Parameters stay float32.
      revision, ema, variant, tokenizer, config, parts, verify: see ``weights.source.open_source``;
        ``parts={"vae": "stabilityai/sd-vae-ft-mse"}`` takes the autoencoder from elsewhere.

    Raises:
      RequestError: there is no such model. WeightsError: it is damaged, or not Stable Diffusion v1.
    """
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in DTYPES:
        raise RequestError(f"dtype {dtype!r} is not known; use one of {', '.join(DTYPES)}")
    opened = open_source(
        source,
        revision=revision,
        ema=ema,
        variant=variant,
        tokenizer=tokenizer,
        config=config,
        parts=parts,
        verify=verify,
    )
    for note in opened.report.notes:
        warnings.warn(note, stacklevel=2)
    if opened.licence is not None:
        warnings.warn(
            f"these are Stable Diffusion v1 weights under the {opened.licence} licence: not to be used to make or "
            "spread images that people would foreseeably find disturbing, distressing or offensive, that harass or "
            "impersonate, or that pass for factual; read https://huggingface.co/CompVis/stable-diffusion-v1-4 and "
            "https://huggingface.co/spaces/CompVis/stable-diffusion-license",
            LicenceNotice,
            stacklevel=2,
        )
    params = opened.params(place=lambda path, array: jax.device_put(array))
    return Pipeline(SD(opened.config, dtype), params, opened.tokenizer, opened.report)
