"""A few numbers that each network of a model gives for fixed inputs: what shapes and names cannot tell of two models.

A checkpoint with the wrong number of heads or groups, or another epsilon, in its config loads without a word and makes
other pictures. So a conversion ends with a probe, which is kept with the result; whoever probes it again (``sd-jax info
--probe``, or the next conversion) finds out whether it still computes the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sd_jax.config import SDConfig
from sd_jax.models.clip import CLIPText
from sd_jax.models.unet import UNet
from sd_jax.models.vae import VAE
from sd_jax.types import Array, Params
from sd_jax.weights.parameters import Parameter, to_params

VERSION = 1  # of the inputs below; only probes of one version compare
SAME = 1e-3  # of the spread of the numbers: the same values, on another machine
CAST = 0.1  # and the same values in another of the dtypes; a wrong number of groups is off by 0.5
NUMBERS = 16  # of each output
GRID = 24  # latents along each side; on fewer, XLA copies most of v1-4's kernels: 1 GB more for 16, and not faster

Probe = dict[str, list[float | None]]  # None: not finite


def probe(config: SDConfig, parameters: Mapping[str, Parameter]) -> Probe:
    """{"text", "unet", "encode", "decode"} -> NUMBERS of that output, in float32. One network at a time is read."""

    def params(component: str) -> Params:
        own = {path: parameter for path, parameter in parameters.items() if path.startswith(f"{component}/")}
        return to_params(own, "float32", lambda _, array: jax.device_put(array), finite=False)[component]

    text, unet, vae = _programs(jax.default_backend())
    with jax.default_matmul_precision("highest"):  # each result is waited for, as until then its parameters are kept
        context = np.asarray(text(config, params("clip")))
        eps = np.asarray(unet(config, params("unet"), context))
        mean, decoded = map(np.asarray, vae(config, params("vae")))
    return {name: _some(a) for name, a in {"text": context, "unet": eps, "encode": mean, "decode": decoded}.items()}


def recorded_probe(record: Mapping[str, Any] | None) -> Probe | None:
    """The one in a record, if it was made with the inputs of today."""
    record = record or {}
    return record.get("probe") if record.get("probe_version") == VERSION else None


def distance(one: Probe, other: Probe) -> tuple[str, float]:
    """-> (the output that differs most, by how much: the largest difference over the spread of the numbers)."""
    worst = {name: _difference(one[name], other.get(name, [])) for name in one}
    name = max(worst, key=worst.__getitem__)
    return name, worst[name]


def _difference(one: list[float | None], other: list[float | None]) -> float:
    if [x is None for x in one] != [x is None for x in other]:
        return math.inf
    pairs = np.array([(x, y) for x, y in zip(one, other, strict=True) if x is not None])
    return float(np.abs(pairs[:, 0] - pairs[:, 1]).max() / (pairs[:, 0].std() or 1.0)) if len(pairs) else 0.0


def _some(output: np.ndarray) -> list[float | None]:
    chosen = output.reshape(-1)[np.linspace(0, output.size - 1, NUMBERS).astype(int)]
    return [float(f"{value:.7g}") if np.isfinite(value) else None for value in chosen]


def _wave(*shape: int) -> Array:
    """Smooth and without symmetry, with variance 1: made from no generator whose draws could ever change."""
    return jnp.sqrt(2.0) * jnp.sin(0.37 * jnp.arange(np.prod(shape)) ** 1.2 % (2 * jnp.pi)).reshape(shape)


@functools.cache
def _programs(backend: str) -> list[Callable[..., Any]]:
    """The three below, compiled once for each config. They run once, so on a CPU quick compilation is worth more."""
    options = {"xla_backend_optimization_level": 0} if backend == "cpu" else None
    return [jax.jit(f, static_argnames="config", compiler_options=options) for f in (_text, _unet, _vae)]


def _text(config: SDConfig, params: Params) -> Array:
    tokens = jnp.arange(config.clip.positions)[None] * 7919 % config.clip.vocab_size
    return CLIPText(config.clip).apply({"params": params}, tokens)


def _unet(config: SDConfig, params: Params, context: Array) -> Array:
    x, t = _wave(1, GRID, GRID, config.unet.in_channels), jnp.full((1,), config.noise.train_steps / 4)
    return UNet(config.unet).apply({"params": params}, x, t, context)


def _vae(config: SDConfig, params: Params) -> tuple[Array, Array]:
    side, vae = GRID // 2 * config.vae.factor, VAE(config.vae)
    image = jnp.tanh(_wave(1, side, side, config.vae.image_channels))
    mean = vae.apply({"params": params}, image, method="encode").mean
    return mean, vae.apply({"params": params}, mean, method="decode")
