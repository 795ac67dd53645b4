"""The denoising loop, and the names of the samplers it runs.

A sampler is a pytree with ``init(x) -> state`` and ``step(denoise, x, state, s, keys) -> (x, state, aux)``, and, if its
time grid is not DDIM's, a class attribute ``grid`` (``schedule.Grid``). Numbers that people sweep are its leaves. Make
it with ``types.pytree``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sd_jax.diffusion.draws import fold
from sd_jax.diffusion.multistep import LMS, PLMS, DPMpp2M, DPMpp2MSDE, UniPC
from sd_jax.diffusion.singlestep import DDIM, DDPM, DPM2, DPM2A, Euler, EulerA, Heun
from sd_jax.types import Array, Denoise, LatentEdit, RequestError, Sampler, Step


def sample(
    sampler: Sampler,
    denoise: Denoise,
    x: Array,
    steps: Step,
    keys: Array,
    edit: LatentEdit | None = None,
    collect: Callable[[Array, Step, Any], Any] | None = None,
    on_step: Callable[[Any], None] | None = None,
) -> tuple[Array, Any]:
    """Walks ``x`` [B, h, w, C] along the rows of ``steps``: the only loop over denoising steps there is.

    ``steps`` is ``time_grid``'s (or ``reverse`` of it), made for this sampler; its length is static, its values are
    data. ``keys`` [B] are the images' own; all rows of denoising step i are given ``fold(keys, i)``, so a sampler draws
    in only one of them, and splits its keys if it draws twice. After each row ``edit`` may change x, ``collect(x, s,
    aux)`` may report something, and ``on_step`` is told the row's number, on the host: in no promised order, without
    effect on the result, and once per lane or device under vmap and pmap. To change the listener of a compiled program
    give ``on_step`` a ``Progress``.

    Returns x (float32, or float64 if it came so) and what ``collect`` reported, stacked on a leading axis of rows, or
    None.
    """
    x = jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))
    steps = dataclasses.replace(jax.tree.map(lambda v: jnp.asarray(v, x.dtype), steps), i=jnp.asarray(steps.i))

    def model(x: Array, s: Step) -> tuple[Array, Any]:
        eps, aux = denoise(x, s)
        return eps.astype(x.dtype), aux

    def row(carry: tuple, number_and_step: tuple) -> tuple[tuple, Any]:
        (x, state, memory), (number, s) = carry, number_and_step
        x, state, aux = sampler.step(model, x, state, s, fold(keys, s.i))
        if edit is not None:
            x, memory = edit.update(x, memory, s, aux)
        if on_step is not None:
            jax.debug.callback(on_step, number)
        return (x, state, memory), None if collect is None else collect(x, s, aux)

    carry = (x, sampler.init(x), () if edit is None else edit.init(x))
    (x, _, _), collected = jax.lax.scan(row, carry, (jnp.arange(steps.i.shape[0]), steps))
    return x, collected


@dataclasses.dataclass(eq=False)
class Progress:
    """An ``on_step`` whose listener can be changed without compiling anew: keep one, and set ``listener`` for each run.

    It is hashed by identity, so it may be a static argument of a jitted function.
    """

    listener: Callable[[int], None] | None = None

    def __call__(self, number: Any) -> None:
        if self.listener is not None:
            self.listener(int(number))


SAMPLERS: dict[str, type] = {
    "plms": PLMS,
    "ddim": DDIM,
    "ddpm": DDPM,
    "lms": LMS,
    "euler": Euler,
    "euler_a": EulerA,
    "heun": Heun,
    "dpm2": DPM2,
    "dpm2_a": DPM2A,
    "dpmpp_2m": DPMpp2M,
    "dpmpp_2m_sde": DPMpp2MSDE,
    "unipc": UniPC,
}


def make_sampler(name: str, eta: Array | float = 0.0) -> Sampler:
    """The sampler of that name. Raises RequestError for an unknown name, and for an ``eta`` that it does not have."""
    if name not in SAMPLERS:
        raise RequestError(f"sampler {name!r} is not known; choose one of {', '.join(SAMPLERS)}")
    kind = SAMPLERS[name]
    if "eta" in {field.name for field in dataclasses.fields(kind)}:
        return kind(eta=eta)
    if not isinstance(eta, jax.core.Tracer) and eta != 0:
        raise RequestError(f"sampler {name!r} has no eta, and eta {eta} was given; leave it 0, or choose 'ddim'")
    return kind()
