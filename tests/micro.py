"""The smallest model that has every part, for tests of what is made of the parts: NANO takes several times as long."""

import atexit
import functools
import tempfile
from pathlib import Path

import numpy as np

from sd_jax.config import CLIPConfig, NoiseConfig, SDConfig, UNetConfig, VAEConfig
from sd_jax.pipeline import SD, Pipeline
from sd_jax.tokenizer import Tokenizer
from sd_jax.types import Params
from sd_jax.weights.convert import write_native
from sd_jax.weights.source import Report
from tests.random_weights import checkpoint as torch_checkpoint
from tests.random_weights import noise, our_params

MICRO = SDConfig(
    clip=CLIPConfig(vocab_size=514, width=16, mlp_width=32, layers=1, heads=2),
    unet=UNetConfig(widths=(16,), layers=1, attention=(True,), heads=(2,), context_width=16, groups=8, sample_size=8),
    vae=VAEConfig(widths=(8, 8), layers=1, groups=4),
    noise=NoiseConfig(sampler="ddim"),
)
SIZE = MICRO.default_size  # 16 pixels
TOKENIZER = Tokenizer.from_merges(())


@functools.cache
def params(config: SDConfig = MICRO) -> Params:
    """Random parameters, with which the network's output follows the latents and the prompt without running wild."""
    return {name: our_params(name, config, torch_checkpoint(name, config)) for name in ("clip", "unet", "vae")}


@functools.cache
def pipeline(config: SDConfig = MICRO) -> Pipeline:
    return Pipeline(SD(config), params(config), TOKENIZER, Report("micro", "native"))


def picture(name: str, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    """A smooth picture, uint8 [height, width, 3]."""
    corners = noise(name, (2, 2, 3))
    y, x = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[:, None]
    rows = np.stack([1 - y, y], -1) @ corners.reshape(2, 6)
    values = np.einsum("wk,hkc->hwc", np.concatenate([1 - x, x], -1), rows.reshape(height, 2, 3))
    return np.clip(128 + 60 * values, 0, 255).astype(np.uint8)


@functools.cache
def micro_file() -> Path:
    """MICRO as one file, for what opens models by path."""
    folder = tempfile.TemporaryDirectory(prefix="sd_jax-tests-")
    atexit.register(folder.cleanup)
    write_native(Path(folder.name) / "micro.safetensors", MICRO, params(), TOKENIZER)
    return Path(folder.name) / "micro.safetensors"
