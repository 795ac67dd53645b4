"""CLIP's text tower (Radford et al. 2021; HF modeling_clip.py): tokens -> the context that the UNet attends to."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from sd_jax.config import CLIPConfig
from sd_jax.models.attention import Attention
from sd_jax.models.layers import layer_norm
from sd_jax.types import Array


def quick_gelu(x: Array) -> Array:
    """CLIP's approximation of the gelu (Hendrycks & Gimpel 2016, section 2), element by element."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": lambda x: jax.nn.gelu(x, approximate=False)}


class CLIPText(nn.Module):
    """tokens int [B,L], L <= 77 -> context [B,L,width] in ``dtype``.

    The context is the last hidden state after the final norm, at every position: padding is not masked. ``skip``
    leaves out the last n layers (A1111's "clip skip 2" is 1) and keeps the final norm.
    """

    config: CLIPConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Array, skip: int = 0) -> Array:
        c = self.config
        length = tokens.shape[-1]
        positions = nn.Embed(c.positions, c.width, dtype=self.dtype, name="position_embedding")(jnp.arange(length))
        x = nn.Embed(c.vocab_size, c.width, dtype=self.dtype, name="token_embedding")(tokens) + positions
        causal = jnp.tril(jnp.ones((length, length), bool))
        for i in range(c.layers - skip):
            x = CLIPLayer(c, self.dtype, name=f"layer_{i}")(x, causal)
        return layer_norm(c.eps, self.dtype, "final_norm")(x)


class CLIPLayer(nn.Module):
    """Pre-norm causal self-attention and MLP: [B,L,width] -> [B,L,width]."""

    config: CLIPConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array, mask: Array) -> Array:
        c = self.config
        h = layer_norm(c.eps, self.dtype, "norm1")(x)
        x = x + Attention(c.heads, self.dtype, qkv_bias=True, name="attention")(h, mask=mask)
        h = layer_norm(c.eps, self.dtype, "norm2")(x)
        h = ACTIVATIONS[c.activation](nn.Dense(c.mlp_width, dtype=self.dtype, name="fc1")(h))
        return x + nn.Dense(c.width, dtype=self.dtype, name="fc2")(h)
