"""Attention: the one place where queries meet keys, and the choice of how.

``attend`` has four ways to compute the same function, chosen per layer at trace time by the pure predicate ``choose``:
"explicit" shows the probabilities (to an edit, or to nobody), "chunked" is memory-bounded and the fastest on a CPU,
"cudnn" is NVIDIA's flash kernel where its rules allow, "xla" is ``jax.nn.dot_product_attention``. All have a float32
softmax.
"""

from __future__ import annotations

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp

from sd_jax.types import Array, AttnEdit, Site, Step

_CHUNK = 512  # queries at a time; one head's chunk of scores then stays in a core's cache


def choose(
    *,
    backend: str,
    dtype: jnp.dtype,
    head_dim: int,
    queries: int,
    keys: int,
    edited: bool,
    masked: bool,
    capability: float = 0.0,
) -> str:
    """The way ``attend`` goes for one layer: "explicit", "chunked", "cudnn" or "xla". Pure, so that it can be tested.

    ``capability`` is an NVIDIA GPU's compute capability, 0 for any other device. cuDNN's kernel needs Ampere, and
    Hopper for heads wider than 128; where its rules are not met it raises, so they are asked first.
    """
    if edited or masked:
        return "explicit"
    half = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    if half and capability >= 8.0 and head_dim % 8 == 0 and head_dim <= (256 if capability >= 9.0 else 128):
        return "cudnn"
    if queries * keys < 1024 * 1024:
        return "explicit" if backend == "cpu" else "xla"
    # Larger: "chunked" bounds the memory, on a CPU and for heads wider than any flash kernel takes (the VAE's 512).
    # "xla" is faster elsewhere, but holds all the scores of a layer at once.
    return "chunked" if backend == "cpu" or head_dim > 256 else "xla"


def _capability() -> float:
    """Of the first device: 0 unless it is an NVIDIA GPU (a ROCm one names an architecture there instead)."""
    try:
        return float(jax.local_devices()[0].compute_capability)
    except (AttributeError, ValueError):
        return 0.0


def attend(q: Array, k: Array, v: Array, *, mask: Array | None = None, how: str | None = None) -> Array:
    """softmax(q k / sqrt(d)) v. ``q`` [N,Q,H,d], ``k`` and ``v`` [N,K,H,d] -> [N,Q,H,d]; ``mask`` [Q,K], True is
    kept.
    """
    if how is None:
        how = choose(
            backend=jax.default_backend(),
            dtype=q.dtype,
            head_dim=q.shape[-1],
            queries=q.shape[1],
            keys=k.shape[1],
            edited=False,
            masked=mask is not None,
            capability=_capability(),
        )
    if how == "explicit":
        return mix(probabilities(q, k, mask), v)
    if how == "chunked":
        return _chunked(q, k, v)
    return jax.nn.dot_product_attention(q, k, v, implementation=how)


def probabilities(q: Array, k: Array, mask: Array | None = None) -> Array:
    """[N,Q,H,d] and [N,K,H,d] -> float32 [N,H,Q,K]."""
    scores = jnp.einsum("NQHD,NKHD->NHQK", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    return jax.nn.softmax(scores, axis=-1)


def mix(probs: Array, v: Array) -> Array:
    """float32 [N,H,Q,K] and [N,K,H,d] -> [N,Q,H,d] in v's dtype."""
    return jnp.einsum("NHQK,NKHD->NQHD", probs.astype(v.dtype), v)


def _chunked(q: Array, k: Array, v: Array) -> Array:
    """Head by head, ``_CHUNK`` queries at a time: at most N x _CHUNK x K scores exist at once, also under
    ``jax.grad``.
    """
    n, length, heads, d = q.shape
    chunks = -(-length // _CHUNK)
    q = jnp.pad(q, ((0, 0), (0, chunks * _CHUNK - length), (0, 0), (0, 0)))
    q = einops.rearrange(q, "n (c q) h d -> h c n q d", c=chunks)
    k, v = (einops.rearrange(a, "n k h d -> h n k d") for a in (k, v))

    @jax.checkpoint
    def one(q: Array, k: Array, v: Array) -> Array:
        scores = jnp.einsum("NQD,NKD->NQK", q, k, preferred_element_type=jnp.float32) * d**-0.5
        return jnp.einsum("NQK,NKD->NQD", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)

    def head(args):
        q, k, v = args
        return jax.lax.map(lambda chunk: one(chunk, k, v), q)

    out = jax.lax.map(head, (q, k, v))
    return einops.rearrange(out, "h c n q d -> n (c q) h d")[:, :length]


class Attention(nn.Module):
    """Multi-head attention of ``x`` [N,Q,C] on ``context`` [N,K,D] (on itself where None) -> [N,Q,C].

    An edit sees the probabilities as [*lead, heads, Q, K], where ``lead`` (prod = N) is the UNet's own batch shape;
    what it returns is also sown as ``intermediates/probs``, so that maps can be read without being changed. CompVis
    attention.py, CrossAttention; HF modeling_clip.py for ``qkv_bias``.
    """

    heads: int
    dtype: jnp.dtype
    qkv_bias: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        context: Array | None = None,
        *,
        mask: Array | None = None,
        site: Site | None = None,
        edit: AttnEdit | None = None,
        step: Step | None = None,
        lead: tuple[int, ...] = (),
    ) -> Array:
        width = x.shape[-1]
        context = x if context is None else context

        def project(a: Array, name: str) -> Array:
            a = nn.Dense(width, use_bias=self.qkv_bias, dtype=self.dtype, name=name)(a)
            return einops.rearrange(a, "n l (h d) -> n l h d", h=self.heads)

        q, k, v = project(x, "q"), project(context, "k"), project(context, "v")
        if edit is not None and edit.where(site):
            probs = probabilities(q, k, mask)
            edited = edit(probs.reshape(*lead, *probs.shape[1:]), site, step)
            self.sow("intermediates", "probs", edited)
            out = mix(edited.reshape(probs.shape), v)
        else:
            out = attend(q, k, v, mask=mask)
        return nn.Dense(width, dtype=self.dtype, name="out")(einops.rearrange(out, "n l h d -> n l (h d)"))
