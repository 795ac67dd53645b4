"""What a run learns: a loss over parameters, the examples it is given, and pictures of how far it has come.

``vae``        images -> themselves, through a latent that is close to a normal distribution
``text``       caption -> the mean latent of its picture, by a linear map of the text tower's state at the end of
               the caption. Where things stand cannot be guessed without word order, which the tower so learns in
               seconds, and from the UNet's gradients hardly at all.
``diffusion``  latents and captions -> the noise, with text tower and UNet together
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import einops
import jax
import jax.numpy as jnp
import numpy as np

from sd_jax import pipeline
from sd_jax.diffusion import draws
from sd_jax.images import from_uint8, to_uint8
from sd_jax.tokenizer import Tokenizer
from sd_jax.train import data, losses, scenes
from sd_jax.train.config import TrainConfig
from sd_jax.train.data import Examples
from sd_jax.train.state import Loss
from sd_jax.types import Params, RequestError

PREVIEWS = 8  # pictures in a preview
PREVIEW_STEPS = 20


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    params: Params  # all of them, by component; which of them are trained is TrainConfig.trainable's
    loss: Loss
    examples: Examples
    preview: Callable[[Params], np.ndarray] | None = None  # params -> uint8 [N,H,W,3]
    # What else belongs to the model that is learnt, where it is a whole one: further components, and the tokenizer.
    others: Mapping[str, Params] = dataclasses.field(default_factory=dict)
    tokenizer: Tokenizer | None = None


def make_task(
    config: TrainConfig,
    folder: str | Path,
    start: Mapping[str, Params],
    tokenizer: Tokenizer | None = None,
    *,
    stop: Callable[[], bool] = data.never,
    log: Callable[[str], None] | None = None,
) -> Task:
    """The task that ``config`` names, on data kept in ``folder``. ``start`` has parameters by component: "clip", ...;
    ``tokenizer`` is the scenes' own by default.

    A component that is not in ``start`` is initialised, but for the autoencoder that encodes the pictures of "text" and
    "diffusion". Raises RequestError, and Interrupted if ``stop`` says so while data are made.
    """
    sd = pipeline.SD(config.model, config.dtype)
    encoded = config.task != "vae"
    if encoded and "vae" not in start:
        raise RequestError(f"task {config.task} needs an autoencoder to start from; name one in init_from")
    images, captions = data.load_scenes(folder, config.data, config.model.default_size, stop=stop, log=log)
    if not encoded:
        return vae_task(config, sd, start, images)
    tokenizer = tokenizer or data.scene_tokenizer()
    tokenizer.check(config.model.clip.vocab_size)
    tokens, empty = data.tokenize(tokenizer, captions)
    mean, std = data.load_posteriors(folder, sd, start["vae"], images, stop=stop, log=log)
    if config.task == "text":
        return text_task(config, sd, start, tokens, mean, tokenizer.eos_id)
    return diffusion_task(config, sd, start, {"tokens": tokens, "mean": mean, "std": std}, empty, tokenizer)


def vae_task(config: TrainConfig, sd: pipeline.SD, start: Mapping[str, Params], images: np.ndarray) -> Task:
    """``images`` uint8 [n,H,W,3]."""

    def init(key):
        return sd.vae.init(key, jnp.zeros((1, *images.shape[1:])))["params"]

    def loss(params, batch, key):
        options = dataclasses.asdict(config.vae_loss)
        return losses.vae_loss(sd.vae, params["vae"], from_uint8(batch["image"]), key, **options)

    shown = np.array(images[:PREVIEWS])

    @jax.jit
    def reconstruct(vae, image):
        return to_uint8(sd.vae.apply({"params": vae}, from_uint8(image)))

    def preview(params):
        return np.concatenate([shown, reconstruct(params["vae"], shown)])

    params = {"vae": _take(start, "vae", init, config.seed)}
    return Task(params, loss, Examples({"image": images}, config.batch_size, config.seed), preview)


def text_task(
    config: TrainConfig,
    sd: pipeline.SD,
    start: Mapping[str, Params],
    tokens: np.ndarray,
    mean: np.ndarray,
    eos_id: int,
) -> Task:
    """``tokens`` int32 [n,77], ``mean`` float32 [n,h,w,C]."""
    end = (tokens == eos_id).argmax(1)
    # Causal: what comes after the last caption's end is not seen by any of them.
    arrays = {"tokens": tokens[:, : end.max() + 1], "end": end, "mean": mean}

    def loss(params, batch, key):
        context = sd.clip.apply({"params": params["clip"]}, batch["tokens"]).astype(jnp.float32)
        state = context[jnp.arange(len(context)), batch["end"]]
        guess = state @ params["head"]["kernel"] + params["head"]["bias"]
        square = jnp.mean((guess.reshape(batch["mean"].shape) - batch["mean"]) ** 2)
        return square, {"explained": 1 - square / jnp.var(batch["mean"])}

    size = int(np.prod(mean.shape[1:]))
    head = {"kernel": jnp.zeros((config.model.clip.width, size)), "bias": jnp.zeros(size)}
    params = {"clip": _take(start, "clip", _init_clip(sd), config.seed), "head": head}
    return Task(params, loss, Examples(arrays, config.batch_size, config.seed))


def diffusion_task(
    config: TrainConfig,
    sd: pipeline.SD,
    start: Mapping[str, Params],
    arrays: Mapping[str, np.ndarray],
    empty: np.ndarray,
    tokenizer: Tokenizer,
) -> Task:
    """``arrays``: tokens int32 [n,77]; mean and std of the latents, float32 [n,h,w,C]. ``empty`` int32 [77].

    A batch of b captions makes b * ``repeats`` examples, each with its own latent, timestep and noise.
    """
    c = config.model

    def init(key):
        x = jnp.zeros((1, c.unet.sample_size, c.unet.sample_size, c.unet.in_channels))
        context = jnp.zeros((1, c.clip.positions, c.unet.context_width))
        return zero_outputs(sd.unet.init(key, x, jnp.zeros(1), context)["params"])

    def loss(params, batch, key):
        key_latent, key_noise = jax.random.split(key)
        context = sd.clip.apply({"params": params["clip"]}, batch["tokens"])
        mean, std, context = (
            einops.repeat(a, "b ... -> (b r) ...", r=config.repeats) for a in (batch["mean"], batch["std"], context)
        )
        x0 = mean + std * jax.random.normal(key_latent, mean.shape)

        def predict(x, t):
            return sd.unet.apply({"params": params["unet"]}, x, t, context)

        return losses.diffusion_loss(predict, x0, key_noise, c.noise, config.noise_loss)

    params = {
        "clip": _take(start, "clip", _init_clip(sd), config.seed),
        "unet": _take(start, "unet", init, config.seed + 1),
    }
    examples = Examples(arrays, config.batch_size, config.seed, config.caption_dropout, empty)
    vae = start["vae"]
    return Task(params, loss, examples, _sampling(sd, vae, tokenizer), {"vae": vae}, tokenizer)


def zero_outputs(unet: Params) -> Params:
    """A new UNet whose blocks change nothing yet and whose output is 0, as CompVis' ``zero_module`` makes it.

    That is: the last layer of every residual block and transformer, and of the UNet.
    """

    def zero(path: tuple, leaf: Any) -> Any:
        names = [entry.key for entry in path]
        last = names[-2] in ("conv2", "conv_out") or (names[-2] == "proj_out" and names[-3] != "ff")
        return jnp.zeros_like(leaf) if last else leaf

    return jax.tree_util.tree_map_with_path(zero, unet)


def _init_clip(sd: pipeline.SD) -> Callable[[Any], Params]:
    return lambda key: sd.clip.init(key, jnp.zeros((1, sd.config.clip.positions), jnp.int32))["params"]


def _take(start: Mapping[str, Params], component: str, init: Callable[[Any], Params], seed: int) -> Params:
    """The component of ``start``, of the shapes that ``init`` would give it; a new one where it has none."""
    if component not in start:
        return jax.jit(init)(jax.random.key(seed))
    shapes = [
        {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}
        for leaves, _ in map(
            jax.tree_util.tree_flatten_with_path, (start[component], jax.eval_shape(init, jax.random.key(0)))
        )
    ]
    if wrong := [path for path in {**shapes[0], **shapes[1]} if shapes[0].get(path) != shapes[1].get(path)]:
        path = wrong[0]
        raise RequestError(
            f"{len(wrong)} parameters of {component} to start from do not fit the configured model, such as {path}: "
            f"{shapes[0].get(path)} where {shapes[1].get(path)} is expected; use the model's own configuration"
        )
    return start[component]


def _sampling(sd: pipeline.SD, vae: Params, tokenizer: Tokenizer) -> Callable[[Params], np.ndarray]:
    """Pictures of the benchmark's captions, always from the same seeds."""
    groups = scenes.benchmark_captions(-(-PREVIEWS // 4)).values()
    captions = [caption for group in groups for caption in group][:PREVIEWS]
    plan = pipeline.make_plan(sd.config.noise, PREVIEW_STEPS)
    tokens = tokenizer.encode([text for caption in captions for text in ("", caption)]).tokens
    tokens = einops.rearrange(tokens, "(b p) n l -> b p n l", p=2)
    seeds, size = draws.seed_words(range(PREVIEWS)), (sd.config.default_size,) * 2
    guidance = np.full(PREVIEWS, sd.config.noise.guidance, np.float32)

    @jax.jit
    def draw(params):
        image = pipeline.text_to_image(sd, params, plan, tokens, seeds, guidance, size=size)
        return to_uint8(image)

    return lambda params: np.asarray(draw({**params, "vae": vae}))
