"""What a Stable Diffusion v1 model is, as frozen (hashable) dataclasses, and the way from and to diffusers' JSON files.

``SD_V1_4`` is the released model (CompVis/stable-diffusion configs/stable-diffusion/v1-inference.yaml). ``NANO`` is the same
architecture at toy width, for tests. A JSON file may ask for things v1 never had (linear projections, class embeddings, ...):
those are refused by name, never ignored.
"""

from __future__ import annotations

import dataclasses
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
    attention: tuple[bool, ...] = (True, True, True, False)  # transformer blocks at each level; the middle always has one
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
    """The training noise, and the sampler the checkpoint names as its own."""

    train_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"  # or "linear"
    prediction: str = "epsilon"  # or "v_prediction"
    sampler: str = "plms"
    spacing: str | None = None  # None: the sampler's own default
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


SD_V1_4 = SDConfig()

NANO = SDConfig(
    clip=CLIPConfig(vocab_size=514, width=32, mlp_width=64, layers=2, heads=2),
    unet=UNetConfig(widths=(16, 32, 48, 48), heads=(2, 2, 2, 2), context_width=32, groups=8, sample_size=8),
    vae=VAEConfig(widths=(8, 16, 24, 24), groups=4),
)


# ---- diffusers and transformers JSON ---------------------------------------------------------------------------------------

# Scheduler class of diffusers -> (sampler, spacing when the file names none). DPMSolverMultistep stands for either of its forms.
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
