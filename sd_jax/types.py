"""The contracts that the parts of sd_jax meet at.

One noise notation everywhere: ``x = alpha * x0 + sigma * eps`` with ``alpha**2 + sigma**2 = 1``. Other libraries'
notation (k-diffusion's ``sigma / alpha``, CompVis' ``alphas_cumprod``) is converted where it enters, and nowhere
else.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, Protocol

import flax.struct
import jax

Array = jax.Array
Params = dict[str, Any]


class RequestError(ValueError):
    """The request is wrong and its author can mend it: one sentence with the value, the expectation and the fix.

    The command line prints it without a traceback and exits with 2.
    """


class WeightsError(RequestError):
    """A checkpoint is broken, hostile, or of a model that sd_jax does not run."""


def pytree(cls: type) -> type:
    """``flax.struct.dataclass`` for samplers, edits, and whatever else is handed to a jitted function for its methods.

    In jaxlib 0.10.2 the structures of two ``register_dataclass`` classes with equally many fields compare equal, and
    now and then (when their hashes fall together) jit runs the one's program for the other. Here the class is part of
    the structure.
    """
    cls.__annotations__ = {**inspect.get_annotations(cls), "_class": type}
    cls._class = flax.struct.field(pytree_node=False, default=cls, repr=False, kw_only=True)
    return flax.struct.dataclass(cls)


@flax.struct.dataclass
class Step:
    """One row of the time grid: where the sampler stands and where it goes.

    Every field is a float32 scalar except ``i`` (int32); stacked along a leading axis they are the ``xs`` of the
    denoising scan, so no sampler ever indexes a table.
    """

    i: Array  # index in the whole grid, counted from 0 (image_to_image starts at a later one)
    t: Array  # timestep the UNet is given, 0 ... 999; may be fractional
    alpha: Array
    sigma: Array
    t_next: Array
    alpha_next: Array
    sigma_next: Array


@dataclasses.dataclass(frozen=True)
class Site:
    """Where in the UNet an attention layer stands. Static: ``AttnEdit.where`` is evaluated on it at trace time."""

    name: str  # path in the parameter tree, e.g. "down_0_attn_1/cross_attn"
    cross: bool  # True: image queries, text keys. False: self-attention
    place: str  # "down", "mid" or "up"
    level: int  # 0 is the finest latent grid
    heads: int
    height: int  # of the query grid
    width: int


class Denoise(Protocol):
    """The model as a sampler sees it: ``x`` [B, h, w, C] float32 and a Step -> the predicted noise, float32, same
    shape.

    ``aux`` is whatever the model was asked to report (attention maps, say); XLA drops what nobody reads.
    """

    def __call__(self, x: Array, s: Step) -> tuple[Array, Any]: ...


class Sampler(Protocol):
    """A solver of the denoising differential equation, as a pair of pure functions (a pytree, see samplers.py)."""

    def init(self, x: Array) -> Any: ...

    def step(self, denoise: Denoise, x: Array, state: Any, s: Step, keys: Array) -> tuple[Array, Any, Any]:
        """-> (x at ``s.alpha_next, s.sigma_next``, state, aux). ``keys`` [B]: one key per image, already this step's
        own.
        """
        ...


class LatentEdit(Protocol):
    """A change made to the latents after each step: an inpainting mask, say."""

    def init(self, x: Array) -> Any: ...

    def update(self, x: Array, memory: Any, s: Step, aux: Any) -> tuple[Array, Any]: ...


class AttnEdit(Protocol):
    """A change made to attention probabilities inside the UNet.

    A site for which ``where`` is False keeps its fused kernel. ``probs`` is float32 [B, P, heads, queries, keys],
    where P is 2 under guidance (0 the unconditional, 1 the conditional pass) and 1 without.
    """

    def where(self, site: Site) -> bool: ...

    def __call__(self, probs: Array, site: Site, s: Step) -> Array: ...
