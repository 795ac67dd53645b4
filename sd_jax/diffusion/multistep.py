"""Samplers that extrapolate from the evaluations of earlier steps, which they carry in their state.

PLMS and LMS extrapolate the noise; DPM-Solver++ and UniPC extrapolate the predicted image, against half the log
signal-to-noise ratio ``lam = log(alpha / sigma)``. All begin at first order, wherever on the grid they are started.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax.numpy as jnp
import numpy as np

from sd_jax.diffusion.draws import draw
from sd_jax.diffusion.schedule import Grid, to_x0
from sd_jax.diffusion.singlestep import Euler, Origin, ancestral
from sd_jax.types import Array, Denoise, Step, pytree

# ---- extrapolating the noise ---------------------------------------------------------------------------------------

# Weights of the newest and the three older evaluations: Adams-Bashforth of order 1 to 4, and last the mean that redoes
# the first step.
_PLMS_WEIGHTS = (
    (1, 0, 0, 0),
    (3 / 2, -1 / 2, 0, 0),
    (23 / 12, -16 / 12, 5 / 12, 0),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
    (1 / 2, 1 / 2, 0, 0),
)


@pytree
class PLMS:
    """Pseudo linear multistep: Liu et al. 2022 (arXiv 2202.09778), as in CompVis ``plms.py``; v1-4's own sampler.

    The first step is made, and then made again from where it began with the mean of the noise at its two ends.
    """

    grid = Grid(second="first")

    def init(self, x: Array) -> tuple:
        return Origin.nowhere(x), (jnp.zeros_like(x),) * 3, jnp.int32(0)

    def step(self, denoise: Denoise, x: Array, state: tuple, s: Step, keys: Array) -> tuple[Array, tuple, Any]:
        origin, past, count = state
        eps, aux = denoise(x, s)
        again, origin = origin.of(x, s)
        weights = jnp.asarray(_PLMS_WEIGHTS, x.dtype)[jnp.where(again, 4, count)]
        x = origin.to(_combine(weights, (eps, *past)), s)
        past = tuple(jnp.where(again, old, new) for old, new in zip(past, (eps, *past), strict=False))
        return x, (origin, past, jnp.where(again, count, jnp.minimum(count + 1, 3))), aux


@pytree
class LMS:
    """Linear multistep of order 4 on the grid's own levels (k-diffusion ``sample_lms``)."""

    grid = Euler.grid

    def init(self, x: Array) -> tuple:
        return (jnp.zeros_like(x),) * 3, jnp.zeros(3, x.dtype), jnp.int32(0)

    def step(self, denoise: Denoise, x: Array, state: tuple, s: Step, keys: Array) -> tuple[Array, tuple, Any]:
        past, ks, count = state
        eps, aux = denoise(x, s)
        ks = jnp.concatenate([(s.sigma / s.alpha)[None], ks])
        weights = _adams_weights(ks, jnp.arange(4) <= count, s.sigma_next / s.alpha_next)
        x = s.alpha_next * (x / s.alpha + _combine(weights, (eps, *past)))
        return x, ((eps, *past[:2]), ks[:3], jnp.minimum(count + 1, 3)), aux


def _adams_weights(k: Array, known: Array, k_next: Array) -> Array:
    """Integrals, from k[0] to ``k_next``, of the Lagrange polynomials of the ``known`` among the four nodes ``k``.

    They are cubics at most, so Gauss-Legendre quadrature at two points is exact.
    """
    half = (k_next - k[0]) / 2
    at = k[0] + half * (1 + jnp.asarray([-1, 1], k.dtype) / np.sqrt(3.0))
    factor = known[:, None] & known & ~jnp.eye(4, dtype=bool)  # [the polynomial's node, the other nodes]
    spread = jnp.where(factor, k[:, None] - k, 1.0)
    values = jnp.prod(jnp.where(factor, (at[:, None, None] - k) / spread, 1.0), axis=-1)
    return jnp.where(known, half * values.sum(0), 0.0)


def _combine(weights: Array, terms: tuple) -> Array:
    return sum(w * term for w, term in zip(weights, terms, strict=True))


# ---- extrapolating the image ---------------------------------------------------------------------------------------


def toward(x: Array, x0: Array, alpha: Array, sigma: Array, alpha_next: Array, sigma_next: Array) -> Array:
    """The exact step of the probability flow, if the predicted image stays ``x0`` (DPM-Solver++ of order 1).

    Lu et al. 2022b write ``sigma_next / sigma x - alpha_next (exp(-h) - 1) x0``. This is that, without the exponential
    of the infinite h that the step to sigma 0 has.
    """
    return alpha_next * x0 + sigma_next * ((x - alpha * x0) / sigma)


def _lam(alpha: Array, sigma: Array) -> Array:
    """log(alpha / sigma); log alpha where there is no noise, a finite stand-in for values nobody uses."""
    return jnp.log(alpha) - jnp.log(jnp.where(sigma > 0, sigma, 1.0))


def _second_order(x0: Array, old: Array, lam: Array, lam_old: Array, s: Step, ready: Array) -> Array:
    """The image at the middle of the step in ``lam``, on the line through ``x0`` and the ``old`` prediction.

    Lu et al. 2022b, alg. 2. Just ``x0`` when the old one is not ``ready``, and on the step to sigma 0.
    """
    ready = ready & (s.sigma_next > 0)
    h_old = jnp.where(ready, lam - lam_old, 1.0)
    weight = jnp.where(ready, (_lam(s.alpha_next, s.sigma_next) - lam) / (2 * h_old), 0.0)
    return x0 + weight * (x0 - old)


# DPM-Solver++ and UniPC ask the network at whole timesteps, on a Karras or exponential grid of levels too. The nudge
# keeps an exact timestep from being cut to the one below it by rounding.
_WHOLE = Grid("linspace", to_zero=True, spare=1, karras=np.round, exponential=lambda t: np.floor(t + 1e-6))


@pytree
class DPMpp2M:
    """DPM-Solver++(2M): Lu et al. 2022b (arXiv 2211.01095), alg. 2; of order 1 at first and on the step to sigma 0."""

    grid = _WHOLE

    def init(self, x: Array) -> tuple:
        return jnp.zeros_like(x), jnp.zeros((), x.dtype), jnp.bool_(False)

    def step(self, denoise: Denoise, x: Array, state: tuple, s: Step, keys: Array) -> tuple[Array, tuple, Any]:
        middle, state, aux = self._middle(denoise, x, state, s)
        return toward(x, middle, s.alpha, s.sigma, s.alpha_next, s.sigma_next), state, aux

    def _middle(self, denoise: Denoise, x: Array, state: tuple, s: Step) -> tuple[Array, tuple, Any]:
        eps, aux = denoise(x, s)
        x0, lam = to_x0(eps, x, s), _lam(s.alpha, s.sigma)
        old, lam_old, ready = state
        return _second_order(x0, old, lam, lam_old, s, ready), (x0, lam, jnp.bool_(True)), aux


@pytree
class DPMpp2MSDE(DPMpp2M):
    """SDE-DPM-Solver++(2M): Lu et al. 2022b for the diffusion SDE, in diffusers' midpoint form."""

    def step(self, denoise: Denoise, x: Array, state: tuple, s: Step, keys: Array) -> tuple[Array, tuple, Any]:
        middle, state, aux = self._middle(denoise, x, state, s)
        down, std = ancestral(s.alpha, s.sigma, s.alpha_next, s.sigma_next)
        return toward(x, middle, s.alpha, s.sigma, s.alpha_next, down) + std * draw(keys, x), state, aux


@flax.struct.dataclass
class UniPCState:
    """The step just made, of which the next evaluation is the corrector's."""

    x: Array  # where it began, at the level alpha, sigma
    alpha: Array
    sigma: Array
    x0: Array  # the image predicted there
    older: Array  # and the one before, predicted at lam_older
    lam_older: Array
    count: Array  # how many predictions there are, at most 2


@pytree
class UniPC:
    """UniPC-2 with B(h) = exp(h) - 1: Zhao et al. 2023 (arXiv 2302.04867), alg. 1 and 2, predicting the image.

    Every evaluation first corrects the step that led to it, then predicts the next, which is DPM-Solver++(2M)'s step.
    The corrected point is not evaluated again.
    """

    grid = _WHOLE

    def init(self, x: Array) -> UniPCState:
        zero, one = jnp.zeros_like(x), jnp.ones((), x.dtype)
        return UniPCState(zero, one, one, zero, zero, 0 * one, jnp.int32(0))

    def step(self, denoise: Denoise, x: Array, state: UniPCState, s: Step, keys: Array) -> tuple:
        eps, aux = denoise(x, s)
        x0, lam, lam_old = to_x0(eps, x, s), _lam(s.alpha, s.sigma), _lam(state.alpha, state.sigma)
        x = jnp.where(state.count > 0, self._correct(state, x0, lam, lam_old, s), x)
        middle = _second_order(x0, state.x0, lam, lam_old, s, state.count > 0)
        count = jnp.minimum(state.count + 1, 2)
        state = UniPCState(x, s.alpha, s.sigma, x0, state.x0, lam_old, count)
        return toward(x, middle, s.alpha, s.sigma, s.alpha_next, s.sigma_next), state, aux

    def _correct(self, state: UniPCState, x0: Array, lam: Array, lam_old: Array, s: Step) -> Array:
        """The step of ``state`` made again, knowing the prediction ``x0`` at its end (UniC-2, or UniC-1 at first)."""
        second = state.count > 1
        h = jnp.where(state.count > 0, lam - lam_old, 1.0)
        ratio = jnp.where(second, (state.lam_older - lam_old) / h, -1.0)  # the paper's r_1, negative
        phi1 = jnp.expm1(-h) / -h  # (exp(z) - 1) / z at z = -h, and the next of that family
        phi2 = (phi1 - 1) / -h
        b1, b2 = -h * phi2 / jnp.expm1(-h), 2 * (phi2 - 1 / 2) / jnp.expm1(-h)
        rho = jnp.where(second, (b1 - b2) / (1 - ratio), 0.0)
        rho_end = jnp.where(second, b1 - rho, 1 / 2)
        mean = state.x0 + rho * (state.older - state.x0) / ratio + rho_end * (x0 - state.x0)
        return toward(state.x, mean, state.alpha, state.sigma, s.alpha, s.sigma)
