"""From a network to what a sampler sees: guidance, the prediction's kind, and further input channels.

A ``net`` is a function ``net(x [B, P, h, w, C], t, context [B, P, K, D], s) -> (out [B, P, h, w, C'], aux)``. P, the
number of passes, is 2 under guidance, unconditional (or negative) first, and 1 without. The pair of an image stays
together on an axis of its own, so a batch sharded over devices is split and joined without communication.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from sd_jax.diffusion.schedule import to_eps
from sd_jax.diffusion.singlestep import root
from sd_jax.types import Array, Denoise, Step

Net = Callable[[Array, Array, Array, Step], tuple[Array, Any]]


def denoiser(
    net: Net,
    context: Array,
    scale: Array | float = 1.0,
    *,
    guided: bool = True,
    prediction: str = "epsilon",
    rescale: Array | float | None = None,
    extra: Array | None = None,
) -> Denoise:
    """The ``Denoise`` of a network under classifier-free guidance.

    ``context`` is [B, P, K, D], or [N, B, P, K, D] with one for each of the N denoising steps (null-text inversion; a
    step past the last is all NaN). ``scale`` and ``rescale`` are a float or one per image [B], and may change without
    compiling anew; ``guided=False`` is static, runs the conditional pass (the last) alone, and reads neither.
    ``prediction`` is what the network puts out (``schedule.to_eps``). ``extra`` [B, h, w, E] is appended to x's
    channels: for the inpainting UNet the mask (1 is repainted) and then the latents of the masked image. All but the
    network is float32. Raises ValueError for a guided context that is not in pairs.
    """

    def denoise(x: Array, s: Step) -> tuple[Array, Any]:
        now = context if context.ndim == 4 else jnp.take(context, s.i, axis=0, mode="fill")
        now = now if guided else now[:, -1:]
        if now.shape[1] != 1 + guided:
            raise ValueError(f"guidance needs contexts in pairs, [B, 2, K, D], but these are {now.shape}")
        seen = x if extra is None else jnp.concatenate([x, extra.astype(x.dtype)], axis=-1)
        pair = jnp.broadcast_to(seen[:, None], (seen.shape[0], now.shape[1], *seen.shape[1:]))
        out, aux = net(pair, s.t, now, s)
        out = out.astype(jnp.promote_types(out.dtype, jnp.float32))
        out = combine(out, scale, rescale) if guided else out[:, 0]
        return to_eps(prediction, out, x, s), aux

    return denoise


def combine(pair: Array, scale: Array | float, rescale: Array | float | None = None) -> Array:
    """The guided prediction [B, ...] of the pair [B, 2, ...]: Ho & Salimans 2022 (arXiv 2207.12598), eq. 6.

    ``scale`` (a float or [B]) is 1 for the conditional prediction as it is; the paper's w is scale - 1. ``rescale``,
    phi in Lin et al. 2023 (arXiv 2305.08891), section 3.4, moves the result's standard deviation back towards the
    conditional prediction's: 0 not at all, 1 fully.
    """
    without, given = pair[:, 0], pair[:, 1]
    out = without + _per_image(scale, out=given) * (given - without)
    if rescale is None:
        return out
    axes = tuple(range(1, out.ndim))
    spread = root(jnp.var(out, axes, keepdims=True))
    ratio = root(jnp.var(given, axes, keepdims=True)) / jnp.where(spread > 0, spread, 1.0)
    return out * (1 + _per_image(rescale, out) * (ratio - 1))


def _per_image(value: Array | float, out: Array) -> Array:
    """A float or [B] as what broadcasts against ``out`` [B, ...]."""
    value = jnp.asarray(value, out.dtype)
    return value.reshape(value.shape + (1,) * (out.ndim - 1)) if value.ndim else value
