"""The denoising UNet of Stable Diffusion v1 (Rombach et al. 2022; CompVis openaimodel.py and attention.py)."""

from __future__ import annotations

import math

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sd_jax.config import UNetConfig
from sd_jax.models.attention import Attention
from sd_jax.models.layers import PAD_ALL, Downsample, ResBlock, Upsample, conv3, group_norm, layer_norm
from sd_jax.types import Array, AttnEdit, Site, Step


class UNet(nn.Module):
    """x [*lead,h,w,in_channels], t [*lead] or scalar, context [*lead,K,context_width] -> [*lead,h,w,out_channels]
    float32.

    ``lead`` is any batch shape: [B], or [B,2] for the (unconditional, conditional) pair of guidance, which attention
    edits then see on an axis of its own. Any height and width that the VAE can produce work. ``edit`` and ``step``
    are the attention edit and what it is told of the time (types.AttnEdit). ``remat`` recomputes blocks in the
    backward pass.
    """

    config: UNetConfig
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: Array, t: Array, context: Array, edit: AttnEdit | None = None, step: Step | None = None
    ) -> Array:
        c = self.config
        lead = x.shape[:-3]
        t = jnp.broadcast_to(t, lead).reshape(-1)
        context = context.reshape(-1, *context.shape[-2:]).astype(self.dtype)
        x = x.reshape(-1, *x.shape[-3:]).astype(self.dtype)
        res_block = nn.remat(ResBlock) if self.remat else ResBlock
        transformer = nn.remat(Transformer) if self.remat else Transformer

        temb = TimeEmbedding(c.widths[0], self.dtype, name="time_embedding")(t)

        def block(x: Array, place: str, name: str, level: int, j: int, attention: bool) -> Array:
            """One residual block, and the transformer behind it where the level has them."""
            width = c.widths[level]
            x = res_block(width, c.groups, c.eps, self.dtype, name=f"{name}_res_{j}")(x, temb)
            if attention:
                name = f"{name}_attn_{j}"
                x = transformer(c.heads[level], c.groups, place, level, lead, self.dtype, name=name)(
                    x, context, edit, step
                )
            return x

        x = conv3(c.widths[0], self.dtype, "conv_in")(x)
        skips = [x]
        levels = range(len(c.widths))
        for i in levels:
            for j in range(c.layers):
                x = block(x, "down", f"down_{i}", i, j, c.attention[i])
                skips.append(x)
            if i < levels[-1]:
                x = Downsample(c.widths[i], PAD_ALL, self.dtype, name=f"down_{i}_downsample")(x)
                skips.append(x)

        x = block(x, "mid", "mid", levels[-1], 0, True)
        x = block(x, "mid", "mid", levels[-1], 1, False)

        for i in reversed(levels):
            for j in range(c.layers + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = block(x, "up", f"up_{i}", i, j, c.attention[i])
            if i > 0:
                x = Upsample(c.widths[i], self.dtype, name=f"up_{i}_upsample")(x, skips[-1].shape[1:3])

        x = nn.silu(group_norm(c.groups, c.eps, self.dtype, "norm_out")(x))
        x = conv3(c.out_channels, self.dtype, "conv_out")(x)
        return x.reshape(*lead, *x.shape[1:]).astype(jnp.float32)


class Transformer(nn.Module):
    """Spatial transformer of depth one: [N,h,w,C] attends to itself, then to context [N,K,D] -> [N,h,w,C]."""

    heads: int
    groups: int
    place: str
    level: int
    lead: tuple[int, ...]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, context: Array, edit: AttnEdit | None, step: Step | None) -> Array:
        height, width, features = x.shape[1:]

        def attention(name: str, y: Array, context: Array | None) -> Array:
            site = Site(f"{self.name}/{name}", context is not None, self.place, self.level, self.heads, height, width)
            module = Attention(self.heads, self.dtype, name=name)
            return module(y, context, site=site, edit=edit, step=step, lead=self.lead)

        def norm(name: str, y: Array) -> Array:
            return layer_norm(1e-5, self.dtype, name)(y)

        # proj_in and proj_out are 1x1 convolutions in v1: the same product, over a flattened grid.
        h = group_norm(self.groups, 1e-6, self.dtype, "norm")(x)
        h = nn.Dense(features, dtype=self.dtype, name="proj_in")(einops.rearrange(h, "n h w c -> n (h w) c"))
        h = h + attention("self_attn", norm("norm1", h), None)
        h = h + attention("cross_attn", norm("norm2", h), context)
        h = h + GEGLU(self.dtype, name="ff")(norm("norm3", h))
        h = nn.Dense(features, dtype=self.dtype, name="proj_out")(h)
        return x + einops.rearrange(h, "n (h w) c -> n h w c", h=height)


class GEGLU(nn.Module):
    """Gated feed-forward of inner width 4C (Shazeer 2020), with the exact (erf) gelu: [N,L,C] -> [N,L,C]."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        h, gate = jnp.split(nn.Dense(8 * width, dtype=self.dtype, name="proj_in")(x), 2, axis=-1)
        return nn.Dense(width, dtype=self.dtype, name="proj_out")(h * jax.nn.gelu(gate, approximate=False))


class TimeEmbedding(nn.Module):
    """t [N] float32 -> [N, 4 width] in ``dtype``: sinusoids (Vaswani et al. 2017) and an MLP.

    Both are float32 whatever ``dtype`` is: bfloat16 cannot tell neighbouring timesteps apart.
    """

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, t: Array) -> Array:
        h = nn.silu(nn.Dense(4 * self.width, dtype=jnp.float32, name="fc1")(sinusoids(t, self.width)))
        return nn.Dense(4 * self.width, dtype=jnp.float32, name="fc2")(h).astype(self.dtype)


def sinusoids(t: Array, width: int) -> Array:
    """t [N] -> float32 [N, width]: cosines, then sines, of width/2 frequencies from 1 down to almost 1/10000."""
    half = width // 2
    frequencies = np.exp(-math.log(10000.0) * np.arange(half, dtype=np.float32) / np.float32(half))
    angles = t.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
