"""What a Stable Diffusion v1 model is, as frozen (hashable) dataclasses, and the way from and to diffusers' JSON files.

``SD_V1_4`` is the released model (CompVis/stable-diffusion configs/stable-diffusion/v1-inference.yaml). ``NANO`` is
the same architecture at toy width, for tests. A JSON file may ask for things v1 never had (linear projections, class
embeddings, ...): those are refused by name, never ignored.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from sd_jax.types import RequestError


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Text tower of CLIP (Radford et al. 2021); defaults are ViT-L/14's."""

    vocab_size: int = 49408
    width: int = 768
    mlp_width: int = 3072
    layers: int = 12
    heads: int = 12
    positions: int = 77
    activation: str = "quick_gelu"
    eps: float = 1e-5


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Denoising UNet (Rombach et al. 2022). ``in_channels`` is 4, or 9 for the inpainting model."""

    in_channels: int = 4
    out_channels: int = 4
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    layers: int = 2  # residual blocks a level on the way down; one more on the way up
    attention: tuple[bool, ...] = (
        True,
        True,
        True,
        False,
    )  # transformer blocks at each level; the middle always has one
    heads: tuple[int, ...] = (8, 8, 8, 8)  # number of heads at each level
    context_width: int = 768
    groups: int = 32
    eps: float = 1e-5
    sample_size: int = 64  # latent height and width the model was trained at


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """KL-regularised autoencoder; defaults are kl-f8's."""

    image_channels: int = 3
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2  # residual blocks a level in the encoder; one more in the decoder
    groups: int = 32
    eps: float = 1e-6
    scale: float = 0.18215  # latents are multiplied by it after encoding

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.widths) - 1)


@dataclasses.dataclass(frozen=True)
class NoiseConfig:
    """The training noise, and how the checkpoint is sampled unless something else is asked for."""

    train_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"  # or "linear"
    prediction: str = "epsilon"  # or "v_prediction"
    sampler: str = "plms"
    spacing: str | None = None  # None: the sampler's own default
    guidance: float = 7.5
    steps_offset: int = 1
    final_alpha_one: bool = False  # samplers of the DDIM family end on alpha = 1 instead of the first training level


@dataclasses.dataclass(frozen=True)
class SDConfig:
    """A whole model."""

    clip: CLIPConfig = CLIPConfig()
    unet: UNetConfig = UNetConfig()
    vae: VAEConfig = VAEConfig()
    noise: NoiseConfig = NoiseConfig()

    @property
    def default_size(self) -> int:
        """Height and width in pixels the model was trained at."""
        return self.unet.sample_size * self.vae.factor

    @property
    def misfits(self) -> str:
        """What keeps the three networks from working together, in words; "" where nothing does."""
        z, unet = self.vae.latent_channels, self.unet
        pairs = {
            f"the text encoder gives {self.clip.width} numbers a token and the UNet takes {unet.context_width}": (
                self.clip.width == unet.context_width
            ),
            f"the autoencoder has {z} channels and the UNet {unet.in_channels} in and {unet.out_channels} out": (
                unet.out_channels == z and unet.in_channels in (z, 2 * z + 1)
            ),
        }
        return " and ".join(text for text, fits in pairs.items() if not fits)


SD_V1_4 = SDConfig()

NANO = SDConfig(
    clip=CLIPConfig(vocab_size=514, width=32, mlp_width=64, layers=2, heads=2),
    unet=UNetConfig(widths=(16, 32, 48, 48), heads=(2, 2, 2, 2), context_width=32, groups=8, sample_size=8),
    vae=VAEConfig(widths=(8, 16, 24, 24), groups=4),
)


# ---- diffusers and transformers JSON -------------------------------------------------------------------------------

# Scheduler class of diffusers <-> our sampler.
_SCHEDULERS = {
    "PNDMScheduler": "plms",
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "LMSDiscreteScheduler": "lms",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "HeunDiscreteScheduler": "heun",
    "KDPM2DiscreteScheduler": "dpm2",
    "KDPM2AncestralDiscreteScheduler": "dpm2_a",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "unipc",
}

# Keys of a component's JSON that v1 fixes: a file that says otherwise describes another model. None is always allowed.
_UNET_FIXED = {
    "center_input_sample": (False,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "only_cross_attention": (False,),
    "downsample_padding": (1,),
    "mid_block_scale_factor": (1,),
    "act_fn": ("silu",),
    "transformer_layers_per_block": (1,),
    "dual_cross_attention": (False,),
    "use_linear_projection": (False,),
    "class_embed_type": (),
    "num_class_embeds": (),
    "addition_embed_type": (),
    "encoder_hid_dim": (),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
    "time_cond_proj_dim": (),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "cross_attention_norm": (),
}
_VAE_FIXED = {
    "act_fn": ("silu",),
    "shift_factor": (),
    "latents_mean": (),
    "latents_std": (),
    "use_quant_conv": (True,),
    "use_post_quant_conv": (True,),
    "mid_block_add_attention": (True,),
}
_NOISE_FIXED = {
    "trained_betas": (),
    "clip_sample": (False,),
    "thresholding": (False,),
    "rescale_betas_zero_snr": (False,),
    "use_beta_sigmas": (False,),
    "use_flow_sigmas": (False,),
    "use_lu_lambdas": (False,),
}
# And those of single schedulers: each of our samplers is one of the forms that its scheduler has.
_SCHEDULER_FIXED = {
    "PNDMScheduler": {"skip_prk_steps": (True,)},
    "DDPMScheduler": {"variance_type": ("fixed_small", "fixed_small_log")},
    "EulerDiscreteScheduler": {
        "final_sigmas_type": ("zero",),
        "timestep_type": ("discrete",),
        "interpolation_type": ("linear",),
        "sigma_min": (),
        "sigma_max": (),
    },
    "DPMSolverMultistepScheduler": {
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
        "solver_order": (2,),
        "solver_type": ("midpoint", "logrho", "bh1", "bh2"),  # diffusers takes the others for the first
        "lower_order_final": (True,),
        "euler_at_final": (False,),
        "final_sigmas_type": ("zero",),
    },
    "UniPCMultistepScheduler": {
        "solver_order": (2,),
        "solver_type": ("bh2", "midpoint", "heun", "logrho"),  # diffusers takes the others for the first
        "predict_x0": (True,),
        "lower_order_final": (True,),
        "disable_corrector": ([],),
        "final_sigmas_type": ("zero",),
    },
}
_GUIDANCE = "_guidance"  # ours: diffusers has no place for it, and reads over what begins with an underscore
_DOWN_BLOCKS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}


def from_diffusers(
    *,
    text_encoder: dict[str, Any] | None = None,
    unet: dict[str, Any] | None = None,
    vae: dict[str, Any] | None = None,
    scheduler: dict[str, Any] | None = None,
) -> SDConfig:
    """The parsed JSON files of a diffusers folder (the tower's is transformers') -> SDConfig; what is None is v1-4's.

    Raises:
      RequestError: names every setting of a file that v1 does not have, at once; or a value that makes no network.
    """
    return SDConfig(
        clip=_component("text_encoder", text_encoder, _clip_from, SD_V1_4.clip),
        unet=_component("unet", unet, _unet_from, SD_V1_4.unet),
        vae=_component("vae", vae, _vae_from, SD_V1_4.vae),
        noise=_component("scheduler", scheduler, _noise_from, SD_V1_4.noise),
    )


def _component(part: str, j: dict[str, Any] | None, read: Callable[[dict[str, Any]], Any], default: Any) -> Any:
    if j is None:
        return default
    try:
        config = read(j)
    except (AttributeError, TypeError) as error:
        raise RequestError(f"{part}: its JSON is not laid out as a v1 model's ({error}); fetch it again") from error
    return checked(part, config)


def checked(part: str, config: Any) -> Any:
    """A part of an SDConfig as it is. Raises RequestError for values, which come from JSON, that make no network."""
    fields = {field.name: (getattr(config, field.name), field.default) for field in dataclasses.fields(config)}
    wrong = [f"{name} {value!r}" for name, (value, usual) in fields.items() if not _is_like(value, usual)]
    wrong = wrong or _misfits(config)
    if wrong:
        raise RequestError(f"{part}: {', '.join(wrong)} cannot be; fetch its JSON again, or mend it")
    return config


def _is_like(value: Any, usual: Any) -> bool:
    """Whether ``value`` is of the kind of ``usual``, and numbers are not negative."""
    if isinstance(usual, tuple):
        return isinstance(value, tuple) and value != () and all(_is_like(v, usual[0]) for v in value)
    if isinstance(usual, bool) or isinstance(value, bool):
        return type(value) is type(usual)
    if isinstance(usual, int | float):
        return isinstance(value, int if isinstance(usual, int) else int | float) and 0 <= value < math.inf
    return isinstance(value, str) or value is usual is None


def _misfits(config: Any) -> list[str]:
    """Numbers that do not divide as the layers need them to."""
    widths = getattr(config, "widths", (getattr(config, "width", 0),))
    heads, groups = getattr(config, "heads", 1), getattr(config, "groups", 1)
    heads = heads if isinstance(heads, tuple) else (heads,) * len(widths)
    if len(heads) != len(widths):
        return [f"{len(heads)} numbers of heads for {len(widths)} widths"]
    wrong = [f"width {w} in {n} heads" for w, n in zip(widths, heads, strict=True) if n == 0 or w % n]
    return wrong + [f"width {w} in {groups} groups" for w in widths if groups == 0 or w % groups]


def _clip_from(j: dict[str, Any]) -> CLIPConfig:
    j = j.get("text_config", j)
    # What a file leaves out has transformers' default, which is ViT-B/32's for the sizes.
    config = CLIPConfig(
        vocab_size=j.get("vocab_size", 49408),
        width=j.get("hidden_size", 512),
        mlp_width=j.get("intermediate_size", 2048),
        layers=j.get("num_hidden_layers", 12),
        heads=j.get("num_attention_heads", 8),
        positions=j.get("max_position_embeddings", 77),
        activation=j.get("hidden_act", "quick_gelu"),
        eps=j.get("layer_norm_eps", 1e-5),
    )
    if config.activation not in ("quick_gelu", "gelu"):
        raise RequestError(
            f"text_encoder: hidden_act is {config.activation!r}; CLIP text towers of Stable Diffusion use quick_gelu "
            "or gelu, so this config.json is another model's"
        )
    return config


def _unet_from(j: dict[str, Any]) -> UNetConfig:
    _refuse("unet", j, _UNET_FIXED)
    widths = tuple(j.get("block_out_channels", (320, 640, 1280, 1280)))
    down = tuple(j.get("down_block_types", ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)))
    up = tuple(j.get("up_block_types", ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3))
    mirrored = tuple(name.replace("Down", "Up") for name in reversed(down))
    if not set(down) <= set(_DOWN_BLOCKS) or up != mirrored or len(down) != len(widths):
        raise RequestError(
            f"unet: down_block_types {list(down)} and up_block_types {list(up)} are not a Stable Diffusion v1 UNet; "
            f"expected one of {sorted(_DOWN_BLOCKS)} for each of the {len(widths)} widths, and their mirror going up"
        )
    # The name is diffusers' historical mistake: for v1 the number is that of heads, not their width.
    heads = j.get("num_attention_heads") or j.get("attention_head_dim", 8)
    return UNetConfig(
        in_channels=j.get("in_channels", 4),
        out_channels=j.get("out_channels", 4),
        widths=widths,
        layers=j.get("layers_per_block", 2),
        attention=tuple(_DOWN_BLOCKS[name] for name in down),
        heads=tuple(heads) if isinstance(heads, list | tuple) else (heads,) * len(widths),
        context_width=j.get("cross_attention_dim", 1280),
        groups=j.get("norm_num_groups", 32),
        eps=j.get("norm_eps", 1e-5),
        sample_size=j.get("sample_size") or 64,
    )


def _vae_from(j: dict[str, Any]) -> VAEConfig:
    _refuse("vae", j, _VAE_FIXED)
    return VAEConfig(
        image_channels=j.get("in_channels", 3),
        latent_channels=j.get("latent_channels", 4),
        widths=tuple(j.get("block_out_channels", (64,))),
        layers=j.get("layers_per_block", 1),
        groups=j.get("norm_num_groups", 32),
        scale=j.get("scaling_factor", 0.18215),
    )


def _noise_from(j: dict[str, Any]) -> NoiseConfig:
    _refuse("scheduler", j, _NOISE_FIXED)
    name = j.get("_class_name", "PNDMScheduler")
    if name not in _SCHEDULERS:
        raise RequestError(f"scheduler: {name!r:.200} is not known; expected one of {', '.join(sorted(_SCHEDULERS))}")
    if wrong := _unlike(j, _SCHEDULER_FIXED.get(name, {})):
        raise RequestError(
            f"scheduler: {wrong} is not a form of {name} that sd_jax has; take it out of "
            "scheduler/scheduler_config.json, or name another scheduler there"
        )
    sampler = _SCHEDULERS[name]
    if sampler == "dpmpp_2m" and j.get("algorithm_type") == "sde-dpmsolver++":
        sampler = "dpmpp_2m_sde"
    prediction, schedule = j.get("prediction_type", "epsilon"), j.get("beta_schedule", "linear")
    if prediction not in ("epsilon", "v_prediction"):
        raise RequestError(f"scheduler: prediction_type {prediction!r} is not known; use epsilon or v_prediction")
    if schedule not in ("scaled_linear", "linear"):
        raise RequestError(f"scheduler: beta_schedule {schedule!r} is not known; use scaled_linear or linear")
    spacing = j.get("timestep_spacing")
    for flag, grid in (("use_karras_sigmas", "karras"), ("use_exponential_sigmas", "exponential")):
        spacing = grid if j.get(flag) else spacing
    return NoiseConfig(
        train_steps=j.get("num_train_timesteps", 1000),
        beta_start=j.get("beta_start", 0.0001),
        beta_end=j.get("beta_end", 0.02),
        beta_schedule=schedule,
        prediction=prediction,
        sampler=sampler,
        spacing=spacing,
        guidance=j.get(_GUIDANCE, 7.5),
        steps_offset=j.get("steps_offset", 0),
        final_alpha_one=j.get("set_alpha_to_one", sampler != "plms"),
    )


def _refuse(part: str, j: dict[str, Any], fixed: dict[str, tuple[Any, ...]]) -> None:
    if wrong := _unlike(j, fixed):
        raise RequestError(
            f"{part}: {wrong} is not Stable Diffusion v1's architecture, the one that sd_jax runs; use a v1 checkpoint"
        )


def _unlike(j: dict[str, Any], fixed: dict[str, tuple[Any, ...]]) -> str:
    """The settings of ``j`` that are none of the values that ``fixed`` allows, in words; "" where all are."""
    return ", ".join(f"{k} = {j[k]!r:.200}" for k, ok in fixed.items() if j.get(k) is not None and j[k] not in ok)


def to_diffusers(config: SDConfig) -> dict[str, dict[str, Any]]:
    """The JSON contents of a diffusers folder, by component: the inverse of ``from_diffusers``."""
    clip, unet, vae, noise = config.clip, config.unet, config.vae, config.noise
    text_encoder = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": clip.vocab_size,
        "hidden_size": clip.width,
        "intermediate_size": clip.mlp_width,
        "projection_dim": clip.width,
        "num_hidden_layers": clip.layers,
        "num_attention_heads": clip.heads,
        "max_position_embeddings": clip.positions,
        "hidden_act": clip.activation,
        "layer_norm_eps": clip.eps,
        "bos_token_id": clip.vocab_size - 2,
        "eos_token_id": clip.vocab_size - 1,
        "pad_token_id": clip.vocab_size - 1,
    }
    down = ["CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in unet.attention]
    heads = set(unet.heads)
    return {
        "text_encoder": text_encoder,
        "unet": {
            "_class_name": "UNet2DConditionModel",
            "_diffusers_version": "0.42.1",
            "in_channels": unet.in_channels,
            "out_channels": unet.out_channels,
            "block_out_channels": list(unet.widths),
            "layers_per_block": unet.layers,
            "down_block_types": down,
            "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
            "mid_block_type": "UNetMidBlock2DCrossAttn",
            "attention_head_dim": heads.pop() if len(heads) == 1 else list(unet.heads),
            "cross_attention_dim": unet.context_width,
            "norm_num_groups": unet.groups,
            "norm_eps": unet.eps,
            "sample_size": unet.sample_size,
            "act_fn": "silu",
            "flip_sin_to_cos": True,
            "freq_shift": 0,
            "downsample_padding": 1,
            "center_input_sample": False,
            "mid_block_scale_factor": 1,
        },
        "vae": {
            "_class_name": "AutoencoderKL",
            "_diffusers_version": "0.42.1",
            "in_channels": vae.image_channels,
            "out_channels": vae.image_channels,
            "latent_channels": vae.latent_channels,
            "block_out_channels": list(vae.widths),
            "layers_per_block": vae.layers,
            "down_block_types": ["DownEncoderBlock2D"] * len(vae.widths),
            "up_block_types": ["UpDecoderBlock2D"] * len(vae.widths),
            "norm_num_groups": vae.groups,
            "sample_size": unet.sample_size * vae.factor,
            "scaling_factor": vae.scale,
            "act_fn": "silu",
        },
        "scheduler": _scheduler_json(noise),
    }


def _scheduler_json(noise: NoiseConfig) -> dict[str, Any]:
    name = "dpmpp_2m" if noise.sampler == "dpmpp_2m_sde" else noise.sampler
    j = {
        "_class_name": next(k for k, v in _SCHEDULERS.items() if v == name),
        "_diffusers_version": "0.42.1",
        "num_train_timesteps": noise.train_steps,
        "beta_start": noise.beta_start,
        "beta_end": noise.beta_end,
        "beta_schedule": noise.beta_schedule,
        "prediction_type": noise.prediction,
        "steps_offset": noise.steps_offset,
        "set_alpha_to_one": noise.final_alpha_one,
        "clip_sample": False,
    }
    if name == "plms":
        j["skip_prk_steps"] = True
    if noise.sampler == "dpmpp_2m_sde":
        j["algorithm_type"] = "sde-dpmsolver++"
    if noise.spacing in ("karras", "exponential"):
        j[f"use_{noise.spacing}_sigmas"] = True
    elif noise.spacing is not None:
        j["timestep_spacing"] = noise.spacing
    if noise.guidance != NoiseConfig.guidance:
        j[_GUIDANCE] = noise.guidance
    return j
