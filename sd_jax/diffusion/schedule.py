"""Noise levels: the training table, the forward process, and the time grids that samplers walk down.

``x = alpha * x0 + sigma * eps`` throughout. Sampling grids are laid out on ``k = sigma / alpha``, the noise level of
k-diffusion (Karras et al. 2022), because that is where their authors define them; no ``k`` leaves this module.
Everything up to the returned arrays is float64 numpy on the host.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable
from typing import Any

import numpy as np

from sd_jax.config import NoiseConfig
from sd_jax.types import Array, RequestError, Step

SPACINGS = ("leading", "linspace", "trailing", "karras", "exponential")
RHO = 7.0  # Karras et al. 2022, eq. 5


# ---- the forward process -------------------------------------------------------------------------------------------


def alpha_sigma(noise: NoiseConfig) -> tuple[np.ndarray, np.ndarray]:
    """Tables ``alpha, sigma`` [train_steps], float64: cast them last, for in bfloat16 the first alphas round to 1.

    Ho et al. 2020, eq. 4; "scaled_linear" betas are linear in their square root (CompVis ``make_beta_schedule``).
    Raises RequestError for another ``beta_schedule``.
    """
    if noise.beta_schedule == "scaled_linear":
        betas = np.linspace(noise.beta_start**0.5, noise.beta_end**0.5, noise.train_steps) ** 2
    elif noise.beta_schedule == "linear":
        betas = np.linspace(noise.beta_start, noise.beta_end, noise.train_steps)
    else:
        raise RequestError(
            f"beta schedule {noise.beta_schedule!r} is not known; sd_jax has 'scaled_linear' and 'linear'"
        )
    abar = np.cumprod(1 - betas)
    return np.sqrt(abar), np.sqrt(1 - abar)


def q_sample(x0: Array, eps: Array, alpha: Array, sigma: Array) -> Array:
    """A draw of x at the noise level ``alpha, sigma``, which broadcast against ``x0`` (Ho et al. 2020, eq. 4)."""
    return alpha * x0 + sigma * eps


def to_eps(prediction: str, out: Array, x: Array, s: Step) -> Array:
    """The noise that the network's output ``out`` at ``x`` stands for; only ``s.alpha`` and ``s.sigma`` are read.

    ``prediction`` is "epsilon", or "v_prediction": v = alpha eps - sigma x0 (Salimans & Ho 2022, app. D).
    Raises RequestError for another.
    """
    if prediction == "epsilon":
        return out
    if prediction == "v_prediction":
        return s.alpha * out + s.sigma * x
    raise _unknown_prediction(prediction)


def to_x0(eps: Array, x: Array, s: Step) -> Array:
    """The clean latents that ``x`` at level ``s.alpha, s.sigma`` has, if ``eps`` is its noise."""
    return (x - s.sigma * eps) / s.alpha


def target(prediction: str, x0: Array, eps: Array, alpha: Array, sigma: Array) -> Array:
    """What the network is trained to put out, the inverse of ``to_eps``; ``alpha, sigma`` broadcast against ``x0``."""
    if prediction == "epsilon":
        return eps
    if prediction == "v_prediction":
        return alpha * eps - sigma * x0
    raise _unknown_prediction(prediction)


def _unknown_prediction(prediction: str) -> RequestError:
    return RequestError(f"prediction {prediction!r} is not known; sd_jax has 'epsilon' and 'v_prediction'")


# ---- time grids ----------------------------------------------------------------------------------------------------


def _as_is(t: np.ndarray) -> np.ndarray:
    return t


@dataclasses.dataclass(frozen=True)
class Grid:
    """What a sampler wants of its time grid: a static class attribute ``grid`` of the sampler, read by ``time_grid``.

    The defaults are those of a one-evaluation sampler of the DDIM family, and are taken for a sampler without ``grid``.
    """

    spacing: str = "leading"  # where neither the request nor the checkpoint names one
    to_zero: bool = False  # ends on sigma = 0; else on the first training level, or as NoiseConfig.final_alpha_one says
    spare: int = 0  # 1: "leading" and "linspace" lay out one timestep more than there are steps, and drop the lowest
    whole: bool = True  # "linspace" rounds its timesteps to whole numbers
    karras: Callable[[np.ndarray], np.ndarray] = _as_is  # the timesteps of a "karras" grid: fractional, or np.round
    exponential: Callable[[np.ndarray], np.ndarray] = _as_is  # and those of an "exponential" grid
    scaled: bool = False  # starts from sigma * noise, not from unit noise (but never on "leading")
    # Steps of two evaluations: "first" (the first step only) and "next" return to the step's end, "middle" to the
    # geometric mean of its two ks, "down" to that of the first and of the level an ancestral step comes down to.
    second: str | None = None


def time_grid(
    noise: NoiseConfig,
    n: int,
    sampler: Any = None,
    spacing: str | None = None,
    *,
    start: int = 0,
    dtype: Any = np.float32,
) -> Step:
    """The rows of ``sample``: ``n`` denoising steps from noise to image, less the first ``start`` of them.

    Returns a Step of numpy arrays [rows], ``i`` int32 and the others ``dtype``. A row is one evaluation of the network:
    it is asked at ``t``, where x is at the level ``alpha, sigma``, and the row takes x to the level ``*_next``. Rows of
    one denoising step have the same ``i``, counted in the whole grid whatever ``start``. Samplers that evaluate once a
    step have ``n - start`` rows, Heun and DPM2 twice as many less one, PLMS one more (its first step is done in two
    rows; the first of the rows that are left when ``start`` is given, unless that is the only step).

    ``spacing`` defaults to the checkpoint's, then to the sampler's own. The timesteps and noise levels are those of the
    diffusers 0.42 scheduler of the sampler's name, but for the following.

    - Every row begins where the row before it ended, as in CompVis. diffusers' DDIM and PNDM step to
      ``t - train_steps // n``, which is not the next timestep on a linspace grid, nor on a trailing one whose ``n``
      does not divide ``train_steps``: there they leave noise in the image.
    - PLMS doubles the first step that is run. diffusers' PNDM doubles the first of the whole grid, so under
      image-to-image it runs one noise level behind.
    - One karras or exponential step starts from the highest level, and so do DDIM, PLMS and DDPM, which diffusers does
      not lay out on those grids; DDIM and PLMS then end on the lowest.

    Raises RequestError when ``n``, ``start`` or ``spacing`` cannot be had.
    """
    grid = getattr(sampler, "grid", Grid())
    spacing = spacing or noise.spacing or grid.spacing
    if spacing not in SPACINGS:
        raise RequestError(f"spacing {spacing!r} is not known; choose one of {', '.join(SPACINGS)}")
    _require_whole("steps", n, 1, noise.train_steps)
    if not _fits(noise, n, grid, spacing):
        limit = next((m for m in range(n - 1, 0, -1) if _fits(noise, m, grid, spacing)), 0)
        raise RequestError(
            f"{n} steps of {spacing} spacing do not fit into the model's {noise.train_steps} timesteps; "
            f"use at most {limit} steps, or another spacing"
        )
    _require_whole("start", start, 0, n - 1)

    t, k = _levels(noise, n, grid, spacing)
    rows = []
    for i in range(start, n):
        here, there = (t[i], k[i]), (t[i + 1], k[i + 1])
        if _has_second(grid, k[i + 1], first=i == start, last=i == n - 1):
            between = _second_level(noise, grid, here, there)
            rows += [(i, *here, *between), (i, *between, *there)]
        else:
            rows += [(i, *here, *there)]
    i, t, k, t_next, k_next = np.array(rows, np.float64).T
    alpha, alpha_next = 1 / np.hypot(1, k), 1 / np.hypot(1, k_next)
    floats = (t, alpha, k * alpha, t_next, alpha_next, k_next * alpha_next)
    return Step(i.astype(np.int32), *(v.astype(dtype) for v in floats))


def start_at(n: int, strength: float) -> int:
    """The step at which image-to-image enters a grid of ``n`` steps: ``n - int(n * strength)``, as in diffusers.

    Raises RequestError unless 0 < strength <= 1 and at least one step is left to run. ``n`` is not
    checked at strength 1, which runs them all.
    """
    if strength == 1:
        return 0  # the whole grid, whose limits ``time_grid`` knows
    _require_whole("steps", n, 1)
    if not isinstance(strength, numbers.Real) or not 0 < strength <= 1:
        raise RequestError(f"strength {strength!r} is out of range; give a number above 0 and at most 1")
    if int(n * strength) < 1:
        enough = math.ceil(1e4 / n) / 1e4  # rounded up, or the advice would fail too
        raise RequestError(f"strength {strength} leaves none of the {n} steps to run; give at least {enough:g}")
    return n - int(n * strength)


def reverse(steps: Step) -> Step:
    """The grid walked upwards, from image to noise: what inversion gives to ``sample``.

    ``i`` stays with its interval, so that step ``i`` up and step ``i`` down join the same two levels. Where the grid
    ends on sigma 0, the network is first asked at t = 0 about an image without noise. Raises RequestError for a grid
    with steps of two rows, whose second evaluation has no meaning the other way.
    """
    if len(np.unique(steps.i)) != len(steps.i):
        raise RequestError("a time grid with two evaluations a step cannot be reversed; make it for 'ddim'")
    fields = (steps.t_next, steps.alpha_next, steps.sigma_next, steps.t, steps.alpha, steps.sigma)
    return Step(steps.i[::-1], *(v[::-1] for v in fields))


def start_scale(noise: NoiseConfig, steps: Step, sampler: Any = None, spacing: str | None = None) -> np.ndarray:
    """What unit-normal noise is multiplied with to become the first ``x`` of ``steps``, a grid run from its top.

    1, but for the k-diffusion family off the "leading" spacing: they start from pure noise of their first level,
    ``sigma * noise`` (diffusers' ``init_noise_sigma`` times alpha: sigma_max on most spacings, and on "leading"
    sqrt(sigma_max**2 + 1), which is 1 / alpha). The missing ``1 - sigma`` is 0.2 % for v1-4.
    """
    grid = getattr(sampler, "grid", Grid())
    scaled = grid.scaled and (spacing or noise.spacing or grid.spacing) != "leading"
    return steps.sigma[0] if scaled else np.ones_like(steps.sigma[0])


def _levels(noise: NoiseConfig, n: int, grid: Grid, spacing: str) -> tuple[np.ndarray, np.ndarray]:
    """``t, k`` of the n + 1 levels that bound the n steps, from noise to image."""
    alpha, sigma = alpha_sigma(noise)
    table = sigma / alpha
    to_zero = grid.to_zero or noise.final_alpha_one
    if spacing in ("karras", "exponential"):
        u = np.linspace(0, 1, n if to_zero else n + 1)
        power = (lambda k: k ** (1 / RHO)) if spacing == "karras" else np.log
        inverse = (lambda v: v**RHO) if spacing == "karras" else np.exp
        k = inverse(power(table[-1]) + u * (power(table[0]) - power(table[-1])))
        t = getattr(grid, spacing)(_timestep_of(k, table))[:n]
    else:
        t = _timesteps(noise, n, grid, spacing)
        k = np.interp(t, np.arange(len(table)), table)
    end = 0.0 if to_zero else table[0]
    return np.append(t, 0.0), np.append(k[:n], end)


def _timesteps(noise: NoiseConfig, n: int, grid: Grid, spacing: str) -> np.ndarray:
    """The n timesteps of the spacings that are laid out on t (Lin et al. 2023, table 2), falling."""
    total, parts = noise.train_steps, n + grid.spare
    if spacing == "leading":
        return (np.arange(parts) * (total // parts))[::-1][:n] + float(noise.steps_offset)
    if spacing == "trailing":
        return np.round(np.arange(total, 0, -total / n))[:n] - 1  # arange may round its way to one timestep too many
    t = np.linspace(0, total - 1, parts)[::-1][:n]
    return np.round(t) if grid.whole else t


def _timestep_of(k: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The fractional timestep of a noise level, linear in log k between the training levels (k-diffusion)."""
    return np.interp(np.log(k), np.log(table), np.arange(len(table)))


def _has_second(grid: Grid, k_next: float, first: bool, last: bool) -> bool:
    if grid.second == "first":
        return first and not last
    return grid.second is not None and k_next > 0  # there is nothing to ask the network at k = 0


def _second_level(noise: NoiseConfig, grid: Grid, here: tuple, there: tuple) -> tuple[float, float]:
    """``t, k`` at which the second evaluation of a step is made."""
    if grid.second in ("first", "next"):
        return there
    alpha, sigma = alpha_sigma(noise)
    end = there[1] if grid.second == "middle" else there[1] ** 2 / here[1]
    k = np.sqrt(here[1] * end)
    return float(_timestep_of(k, sigma / alpha)), k


def _fits(noise: NoiseConfig, n: int, grid: Grid, spacing: str) -> bool:
    """Whether the timesteps exist (an index past the table would be clamped in silence) and the noise falls."""
    t, k = _levels(noise, n, grid, spacing)
    return bool(0 <= t.min() and t.max() < noise.train_steps and np.all(np.diff(k[:n]) < 0))


def _require_whole(name: str, value: Any, low: int, high: int | None = None) -> None:
    limit = math.inf if high is None else high
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= limit:
        upward = "up" if high is None else f"to {high}"
        raise RequestError(f"{name} {value!r} is out of range; give a whole number from {low} {upward}")
