"""Samplers that remember nothing from one denoising step to the next.

All of them are the probability-flow equation ``d(x / alpha) = eps d(sigma / alpha)`` (Song et al. 2021a; Karras et al.
2022), taken in one Euler step (DDIM, Euler) or a second-order one (Heun, DPM2), with or without fresh noise on the way.
In these units DDPM and ancestral Euler are DDIM with eta = 1 on other time grids, and Euler is DDIM with eta = 0.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np

from sd_jax.diffusion.draws import draw
from sd_jax.diffusion.schedule import Grid
from sd_jax.types import Array, Denoise, Step, pytree

# ---- what they are made of -----------------------------------------------------------------------------------------


def move(x: Array, eps: Array, alpha: Array, sigma: Array, alpha_next: Array, sigma_next: Array) -> Array:
    """The Euler step of the probability flow: x / alpha moves by eps times the change in sigma / alpha.

    It is Song et al. 2021a (DDIM), eq. 12 without noise, and the first half of Karras et al. 2022, alg. 1.
    """
    return alpha_next * ((x - sigma * eps) / alpha) + sigma_next * eps


def root(v: Array) -> Array:
    """Square root that is 0 at and below 0, and has a finite derivative there."""
    positive = v > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, v, 1.0)), 0.0)


def k_ratio(alpha: Array, sigma: Array, alpha_next: Array, sigma_next: Array) -> Array:
    """(sigma / alpha at the step's end) / (at its start), in 0 ... 1 on the way down; 1 from a start without noise."""
    noisy = sigma > 0
    return jnp.where(noisy, alpha * sigma_next / (alpha_next * jnp.where(noisy, sigma, 1.0)), 1.0)


def ancestral(
    alpha: Array, sigma: Array, alpha_next: Array, sigma_next: Array, eta: Array = 1.0
) -> tuple[Array, Array]:
    """Splits ``sigma_next`` into what an ancestral step comes down to and the std of the fresh noise it adds.

    DDIM, eq. 16, which with eta = 1 is also DDPM's posterior and k-diffusion's ``get_ancestral_step``. On the way up,
    as in inversion, no noise is added.
    """
    ratio = k_ratio(alpha, sigma, alpha_next, sigma_next)
    std = eta * sigma_next * root((1 - ratio) * (1 + ratio))
    return root(sigma_next**2 - std**2), std


@flax.struct.dataclass
class Origin:
    """Where a denoising step began: its second row goes back there."""

    i: Array
    x: Array
    alpha: Array
    sigma: Array

    @classmethod
    def nowhere(cls, x: Array) -> Origin:
        return cls(jnp.int32(-1), jnp.zeros_like(x), jnp.ones((), x.dtype), jnp.ones((), x.dtype))

    def of(self, x: Array, s: Step) -> tuple[Array, Origin]:
        """-> (whether row ``s`` continues the step of the row before it, the origin of the step it belongs to)."""
        again = s.i == self.i
        pick = lambda old, new: jnp.where(again, old, new)  # noqa: E731
        return again, Origin(s.i, pick(self.x, x), pick(self.alpha, s.alpha), pick(self.sigma, s.sigma))

    def to(self, eps: Array, s: Step) -> Array:
        """x moved along ``eps`` from the origin to the level row ``s`` ends on."""
        return move(self.x, eps, self.alpha, self.sigma, s.alpha_next, s.sigma_next)


# ---- one evaluation a step -----------------------------------------------------------------------------------------


@pytree
class Euler:
    """Karras et al. 2022 (arXiv 2206.00364), alg. 1 without the second-order correction."""

    grid = Grid("linspace", to_zero=True, whole=False, scaled=True)

    def init(self, x: Array) -> tuple:
        return ()

    def step(self, denoise: Denoise, x: Array, state: tuple, s: Step, keys: Array) -> tuple[Array, tuple, Any]:
        eps, aux = denoise(x, s)
        return move(x, eps, s.alpha, s.sigma, s.alpha_next, s.sigma_next), state, aux


class _Ancestral:
    """Euler's method with ``eta`` times the posterior's noise."""

    eta: Array | float

    def init(self, x: Array) -> tuple:
        return ()

    def step(self, denoise: Denoise, x: Array, state: tuple, s: Step, keys: Array) -> tuple[Array, tuple, Any]:
        eps, aux = denoise(x, s)
        down, std = ancestral(s.alpha, s.sigma, s.alpha_next, s.sigma_next, self.eta)
        x = move(x, eps, s.alpha, s.sigma, s.alpha_next, down)
        return x + std * draw(keys, x), state, aux


@pytree
class DDIM(_Ancestral):
    """Song et al. 2021a (arXiv 2010.02502), eq. 12. ``eta`` 0 is the deterministic ODE, 1 draws like DDPM."""

    eta: Array | float = 0.0

    grid = Grid()


@pytree
class DDPM(_Ancestral):
    """Ho et al. 2020 (arXiv 2006.11239), eq. 6 and 7: the posterior's mean and its own (the smaller) variance."""

    eta = 1.0
    grid = Grid(to_zero=True)


@pytree
class EulerA(_Ancestral):
    """Euler's method with ancestral noise (k-diffusion ``sample_euler_ancestral``)."""

    eta = 1.0
    grid = Euler.grid


# ---- two evaluations a step ----------------------------------------------------------------------------------------


@pytree
class Heun:
    """Karras et al. 2022, alg. 1: the mean of the slopes at both ends; plain Euler down to sigma 0."""

    grid = dataclasses.replace(Euler.grid, second="next")

    def init(self, x: Array) -> tuple[Origin, Array]:
        return Origin.nowhere(x), jnp.zeros_like(x)

    def step(self, denoise: Denoise, x: Array, state: tuple, s: Step, keys: Array) -> tuple[Array, tuple, Any]:
        origin, first = state
        eps, aux = denoise(x, s)
        again, origin = origin.of(x, s)
        slope = jnp.where(again, (first + eps) / 2, eps)
        return origin.to(slope, s), (origin, eps), aux


@pytree
class DPM2:
    """DPM-Solver-2: the slope at the middle (Lu et al. 2022, arXiv 2206.00927; k-diffusion ``sample_dpm_2``)."""

    grid = dataclasses.replace(Euler.grid, second="middle", karras=np.round)

    def init(self, x: Array) -> Origin:
        return Origin.nowhere(x)

    def step(self, denoise: Denoise, x: Array, state: Origin, s: Step, keys: Array) -> tuple[Array, Origin, Any]:
        eps, aux = denoise(x, s)
        _, origin = state.of(x, s)
        return origin.to(eps, s), origin, aux


@pytree
class DPM2A:
    """DPM2 with ancestral noise (k-diffusion ``sample_dpm_2_ancestral``), added at the end of each step."""

    grid = dataclasses.replace(DPM2.grid, second="down")

    def init(self, x: Array) -> Origin:
        return Origin.nowhere(x)

    def step(self, denoise: Denoise, x: Array, state: Origin, s: Step, keys: Array) -> tuple[Array, Origin, Any]:
        eps, aux = denoise(x, s)
        again, origin = state.of(x, s)
        down, std = ancestral(origin.alpha, origin.sigma, s.alpha_next, s.sigma_next)
        down, std = jnp.where(again, down, s.sigma_next), jnp.where(again, std, 0.0)
        x = move(origin.x, eps, origin.alpha, origin.sigma, s.alpha_next, down)
        return x + std * draw(keys, x), origin, aux
