"""The pieces the UNet and the VAE share: NHWC, functional, norm statistics in float32.

Flax's defaults differ from the reference in three places, so nothing here relies on them: epsilons are always passed,
the variance is E[(x - mean)^2] rather than E[x^2] - E[x]^2, and strided convolutions are padded explicitly.
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from sd_jax.types import Array

PAD_ALL = ((1, 1), (1, 1))
PAD_END = ((0, 1), (0, 1))  # what the VAE encoder's strided convolutions use


def group_norm(groups: int, eps: float, dtype: jnp.dtype, name: str) -> nn.Module:
    """Wu & He 2018, over [N,h,w,C]: statistics in float32, the result in ``dtype``."""
    return nn.GroupNorm(num_groups=groups, epsilon=eps, use_fast_variance=False, dtype=dtype, name=name)


def layer_norm(eps: float, dtype: jnp.dtype, name: str) -> nn.Module:
    """Ba et al. 2016, over the last axis: statistics in float32, the result in ``dtype``."""
    return nn.LayerNorm(epsilon=eps, use_fast_variance=False, dtype=dtype, name=name)


def conv3(features: int, dtype: jnp.dtype, name: str, *, stride: int = 1, padding=PAD_ALL) -> nn.Module:
    """A 3x3 convolution, [N,h,w,C] -> [N,h/stride,w/stride,features], with torch's padding rather than "SAME"."""
    return nn.Conv(features, (3, 3), strides=(stride, stride), padding=padding, dtype=dtype, name=name)


class ResBlock(nn.Module):
    """[N,h,w,C] (and the time embedding [N,E] in the UNet) -> [N,h,w,features]. CompVis openaimodel.py, ResBlock."""

    features: int
    groups: int
    eps: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, temb: Array | None = None) -> Array:
        h = conv3(self.features, self.dtype, "conv1")(
            nn.silu(group_norm(self.groups, self.eps, self.dtype, "norm1")(x))
        )
        if temb is not None:
            h = h + nn.Dense(self.features, dtype=self.dtype, name="time")(nn.silu(temb))[:, None, None, :]
        h = conv3(self.features, self.dtype, "conv2")(
            nn.silu(group_norm(self.groups, self.eps, self.dtype, "norm2")(h))
        )
        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, dtype=self.dtype, name="skip")(x)  # a 1x1 convolution
        return x + h


class Downsample(nn.Module):
    """[N,h,w,C] -> [N,h/2,w/2,features], odd sides rounded up in the UNet, which pads on all sides; the VAE encoder
    pads at the end only.
    """

    features: int
    padding: tuple[tuple[int, int], tuple[int, int]]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return conv3(self.features, self.dtype, "conv", stride=2, padding=self.padding)(x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a convolution: [N,h,w,C] -> [N,*size,features].

    ``size`` (height, width) is that of the skip connection the result will meet: where an odd grid was halved it is
    one less than the double, and nearest-neighbour resizing to 2n-1 is doubling without the last row.
    """

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, size: tuple[int, int]) -> Array:
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)[:, : size[0], : size[1]]
        return conv3(self.features, self.dtype, "conv")(x)
