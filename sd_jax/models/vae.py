"""The KL autoencoder of latent diffusion (Rombach et al. 2022; CompVis autoencoder.py and
diffusionmodules/model.py).
"""

from __future__ import annotations

import einops
import flax.linen as nn
import flax.struct
import jax.numpy as jnp

from sd_jax.config import VAEConfig
from sd_jax.models.attention import Attention
from sd_jax.models.layers import PAD_END, Downsample, ResBlock, Upsample, conv3, group_norm
from sd_jax.types import Array


@flax.struct.dataclass
class Posterior:
    """Diagonal Gaussian over *scaled* latents, float32: ``mean`` and ``std``, [N,h,w,latent_channels]."""

    mean: Array
    std: Array
    kl: Array  # [N,h,w,C], divergence from the standard normal of the unscaled latents, in nats

    def sample(self, noise: Array) -> Array:
        return self.mean + self.std * noise


class VAE(nn.Module):
    """image [N,H,W,3] in [-1,1] <-> latents [N,H/f,W/f,4]. Scaling belongs to the autoencoder: latents are the
    UNet's.
    """

    config: VAEConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self) -> None:
        c = self.config
        self.encoder = Encoder(c, self.dtype)
        self.quant_conv = nn.Dense(2 * c.latent_channels, dtype=self.dtype)  # 1x1 convolutions, both
        self.post_quant_conv = nn.Dense(c.latent_channels, dtype=self.dtype)
        self.decoder = Decoder(c, self.dtype)

    def __call__(self, image: Array) -> Array:
        """Reconstruct through the posterior's mean (also the way to initialise every parameter)."""
        return self.decode(self.encode(image).mean)

    def encode(self, image: Array) -> Posterior:
        """float [N,H,W,3] in [-1,1], sides multiples of ``factor`` -> what its scaled latents may be, float32."""
        moments = self.quant_conv(self.encoder(image.astype(self.dtype))).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        logvar = jnp.clip(logvar, -30.0, 20.0)
        kl = 0.5 * (mean**2 + jnp.exp(logvar) - 1.0 - logvar)
        return Posterior(self.config.scale * mean, self.config.scale * jnp.exp(0.5 * logvar), kl)

    def decode(self, latents: Array) -> Array:
        """float32 [N,H,W,3], about [-1,1] but not clipped."""
        z = (latents / self.config.scale).astype(self.dtype)
        return self.decoder(self.post_quant_conv(z)).astype(jnp.float32)


class Encoder(nn.Module):
    """[N,H,W,3] -> moments [N,H/f,W/f,2*latent_channels]."""

    config: VAEConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        x = conv3(c.widths[0], self.dtype, "conv_in")(x)
        for i, width in enumerate(c.widths):
            for j in range(c.layers):
                x = ResBlock(width, c.groups, c.eps, self.dtype, name=f"down_{i}_res_{j}")(x)
            if i < len(c.widths) - 1:
                x = Downsample(width, PAD_END, self.dtype, name=f"down_{i}_downsample")(x)
        x = _middle(x, c, self.dtype)
        x = nn.silu(group_norm(c.groups, c.eps, self.dtype, "norm_out")(x))
        return conv3(2 * c.latent_channels, self.dtype, "conv_out")(x)


class Decoder(nn.Module):
    """[N,h,w,latent_channels] -> [N,h*f,w*f,3]. Levels are numbered as in the encoder: 0 is the finest."""

    config: VAEConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = self.config
        x = conv3(c.widths[-1], self.dtype, "conv_in")(x)
        x = _middle(x, c, self.dtype)
        for i, width in reversed(list(enumerate(c.widths))):
            for j in range(c.layers + 1):
                x = ResBlock(width, c.groups, c.eps, self.dtype, name=f"up_{i}_res_{j}")(x)
            if i > 0:
                x = Upsample(width, self.dtype, name=f"up_{i}_upsample")(x, (2 * x.shape[1], 2 * x.shape[2]))
        x = nn.silu(group_norm(c.groups, c.eps, self.dtype, "norm_out")(x))
        return conv3(c.image_channels, self.dtype, "conv_out")(x)


def _middle(x: Array, c: VAEConfig, dtype: jnp.dtype) -> Array:
    """Residual block, attention, residual block, at the coarsest level; the modules belong to the caller."""
    x = ResBlock(c.widths[-1], c.groups, c.eps, dtype, name="mid_res_0")(x)
    x = SpatialAttention(c.groups, c.eps, dtype, name="mid_attn")(x)
    return ResBlock(c.widths[-1], c.groups, c.eps, dtype, name="mid_res_1")(x)


class SpatialAttention(nn.Module):
    """Single-head self-attention over the grid, with a residual: [N,h,w,C] -> [N,h,w,C]."""

    groups: int
    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = group_norm(self.groups, self.eps, self.dtype, "norm")(x)
        h = einops.rearrange(h, "n h w c -> n (h w) c")
        h = Attention(1, self.dtype, qkv_bias=True, name="attention")(h)
        return x + einops.rearrange(h, "n (h w) c -> n h w c", h=x.shape[1])
