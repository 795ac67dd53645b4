"""What training minimises: pure functions of parameters, a batch and a key -> (scalar, metrics)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sd_jax.config import NoiseConfig
from sd_jax.diffusion import schedule
from sd_jax.models.vae import VAE
from sd_jax.types import Array

Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class NoiseLoss:
    """How timesteps are drawn and weighted in ``diffusion_loss``. The defaults are the plain loss of Ho et al. 2020."""

    min_snr: float | None = None  # gamma of Hang et al. 2023: weights min(snr, gamma) / snr (for v: / (snr + 1))
    # Where things stand in a picture is decided at high noise, where the plain loss has next to no weight. This share
    # of the timesteps is drawn from [high_from, train_steps) ...
    high_share: float = 0.0
    high_from: int = 550
    # ... and their weight multiplied by snr^-0.5, at least 1 and at most this.
    high_weight: float = 1.0


def diffusion_loss(
    predict: Callable[[Array, Array], Array],
    x0: Array,
    key: Array,
    noise: NoiseConfig,
    options: NoiseLoss = NoiseLoss(),  # noqa: B008 (frozen)
) -> tuple[Array, Metrics]:
    """Mean squared error of the network's own target, eps or v.

    Args:
      predict: ``(x [B,h,w,C], t [B]) -> out [B,h,w,C]``, the UNet with its context and parameters.
      x0: latents [B,h,w,C], float32.
      key: one key; timesteps and noise are drawn from it.
    Returns:
      the weighted loss; metrics ``mse`` (unweighted), and ``mse_low``/``mse_high`` noise (t below/from 500), where a
      batch without such timesteps reports 0.
    """
    batch = x0.shape[0]
    key_uniform, key_high, key_share, key_eps = jax.random.split(key, 4)
    uniform = jax.random.randint(key_uniform, (batch,), 0, noise.train_steps)
    high = jax.random.randint(key_high, (batch,), options.high_from, noise.train_steps)
    t = jnp.where(jax.random.bernoulli(key_share, options.high_share, (batch,)), high, uniform)

    tables = schedule.alpha_sigma(noise)
    alpha, sigma = (jnp.asarray(a, jnp.float32)[t][:, None, None, None] for a in tables)
    eps = jax.random.normal(key_eps, x0.shape)
    x = schedule.q_sample(x0, eps, alpha, sigma)
    target = schedule.target(noise.prediction, x0, eps, alpha, sigma)
    mse = jnp.mean((predict(x, t.astype(jnp.float32)) - target) ** 2, axis=(1, 2, 3))

    weight = weights((alpha / sigma)[:, 0, 0, 0] ** 2, noise.prediction, options)
    late = (t >= noise.train_steps // 2).astype(jnp.float32)
    return jnp.mean(weight * mse), {
        "mse": jnp.mean(mse),
        "mse_low": jnp.sum((1 - late) * mse) / jnp.maximum(jnp.sum(1 - late), 1),
        "mse_high": jnp.sum(late * mse) / jnp.maximum(jnp.sum(late), 1),
    }


def weights(snr: Array, prediction: str, options: NoiseLoss) -> Array:
    """Loss weight at each signal-to-noise ratio ``snr`` = (alpha/sigma)^2, same shape."""
    weight = jnp.ones_like(snr)
    if options.min_snr is not None:
        weight = jnp.minimum(snr, options.min_snr) / (snr if prediction == "epsilon" else snr + 1)
    return weight * jnp.clip(snr**-0.5, 1.0, options.high_weight)


def vae_loss(
    vae: VAE, params: Any, image: Array, key: Array, *, kl: float = 3e-4, mse: float = 4.0, edges: float = 0.0
) -> tuple[Array, Metrics]:
    """L1 + ``mse`` squared error + ``kl`` divergence a latent element + ``edges`` L1 of image gradients.

    ``image`` [B,H,W,3] in [-1,1]. No perceptual or adversarial network: there is none to be had without a download.
    Metrics: ``psnr`` in dB of the sampled reconstruction, ``kl``.
    """
    posterior = vae.apply({"params": params}, image, method="encode")
    latents = posterior.sample(jax.random.normal(key, posterior.mean.shape))
    error = vae.apply({"params": params}, latents, method="decode") - image
    square, divergence = jnp.mean(error**2), jnp.mean(posterior.kl)
    loss = jnp.mean(jnp.abs(error)) + mse * square + kl * divergence
    if edges:
        loss += edges * sum(jnp.mean(jnp.abs(jnp.diff(error, axis=axis))) for axis in (1, 2))
    return loss, {"psnr": 10 * jnp.log10(4.0 / square), "kl": divergence}
