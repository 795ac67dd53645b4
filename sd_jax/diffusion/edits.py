"""Changes made to the latents between denoising steps, as pairs of ``init`` and ``update``."""

from __future__ import annotations

from typing import Any

from sd_jax.diffusion.schedule import q_sample
from sd_jax.types import Array, LatentEdit, Step, pytree


@pytree
class Inpaint:
    """Keeps what the mask leaves out, and lets the rest be painted, with a network that knows nothing of masks.

    After each row the known latents, noised to the level that the row ends on (diffusers' inpainting pipeline; Lugmayr
    et al. 2022, alg. 1 without resampling), replace x outside the mask. ``noise`` is the same at every row: give the
    noise that sampling started from. After the last row, which need not end on sigma 0, ``composite`` puts the clean
    ones in.
    """

    mask: Array  # [B, h, w, 1]: 1 is repainted, 0 is kept, and what lies between is mixed
    known: Array  # [B, h, w, C], clean latents
    noise: Array  # [B, h, w, C], unit-normal

    def init(self, x: Array) -> tuple:
        return ()

    def update(self, x: Array, memory: tuple, s: Step, aux: Any) -> tuple[Array, tuple]:
        return composite(x, q_sample(self.known, self.noise, s.alpha_next, s.sigma_next), self.mask), memory


def composite(x: Array, known: Array, mask: Array) -> Array:
    """``x`` where ``mask`` is 1 and ``known`` where it is 0, exactly; all [B, h, w, C or 1]. Keeps x's dtype."""
    mask, known = mask.astype(x.dtype), known.astype(x.dtype)
    return mask * x + (1 - mask) * known


@pytree
class Chain:
    """Several edits as one: each is given the latents that the one before it left."""

    edits: tuple[LatentEdit, ...]

    def init(self, x: Array) -> tuple:
        return tuple(edit.init(x) for edit in self.edits)

    def update(self, x: Array, memory: tuple, s: Step, aux: Any) -> tuple[Array, tuple]:
        memories = []
        for edit, own in zip(self.edits, memory, strict=True):
            x, own = edit.update(x, own, s, aux)
            memories.append(own)
        return x, tuple(memories)
