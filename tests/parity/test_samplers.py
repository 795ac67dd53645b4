"""Every sampler against the diffusers scheduler of its name: timesteps, and then every step from diffusers' own state.

The referee is given its noise table in float64, since in float32 it is 7e-5 off at the image end (1 - 0.99915 has four
good digits), more than all else that is compared here. What is left are its float32 sigmas and coefficients, and ours.
"""

from fractions import Fraction
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.config import NoiseConfig
from sd_jax.diffusion.draws import draw, fold
from sd_jax.diffusion.samplers import make_sampler
from sd_jax.diffusion.schedule import alpha_sigma, reverse, start_scale, time_grid

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' own, by the ten thousand

NOISE = NoiseConfig()
COUNTS = (1, 2, 7, 20, 50)
SHAPE = (2, 4, 4, 3)
TOLERANCE = 1e-5  # of the largest value: a step is a few float32 operations, and the coefficients cancel by up to 1e2

ON_T = ("leading", "linspace", "trailing")
ON_K = (*ON_T, "karras", "exponential")
CASES = {
    "plms": (diffusers.PNDMScheduler, {"skip_prk_steps": True}, ON_T),
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}, ON_T),
    "ddpm": (diffusers.DDPMScheduler, {"clip_sample": False}, ON_T),
    "lms": (diffusers.LMSDiscreteScheduler, {}, ON_K),
    "euler": (diffusers.EulerDiscreteScheduler, {}, ON_K),
    "euler_a": (diffusers.EulerAncestralDiscreteScheduler, {}, ON_T),
    "heun": (diffusers.HeunDiscreteScheduler, {}, ON_K),
    "dpm2": (diffusers.KDPM2DiscreteScheduler, {}, ON_K),
    "dpm2_a": (diffusers.KDPM2AncestralDiscreteScheduler, {}, ON_K),
    "dpmpp_2m": (diffusers.DPMSolverMultistepScheduler, {}, ON_K),
    "dpmpp_2m_sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, ON_K),
    "unipc": (diffusers.UniPCMultistepScheduler, {}, ON_K),
}
VARIANCE_EXPLODING = ("lms", "euler", "euler_a", "heun", "dpm2", "dpm2_a")
ETAS = {"ddim": (0.0, 0.6, 1.0)}
ALL = [(name, spacing, n) for name, (_, _, spacings) in CASES.items() for spacing in spacings for n in COUNTS]


def model(tanh, x, t):
    """A network's stand-in: not linear in x, and different at every timestep."""
    return tanh(0.8 * x + t / 500 - 1) + 0.1 * x


@cache
def scheduler_of(name):
    """One scheduler a name, its configuration changed from case to case: some are slow to make."""
    kind, options, _ = CASES[name]
    betas = dict(beta_start=NOISE.beta_start, beta_end=NOISE.beta_end, beta_schedule=NOISE.beta_schedule)
    scheduler = kind(**betas, steps_offset=NOISE.steps_offset, **options)
    scheduler.alphas_cumprod = torch.from_numpy(alpha_sigma(NOISE)[0] ** 2)
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler


def referee(name, spacing, n):
    scheduler = scheduler_of(name)
    sigmas = {f"use_{kind}_sigmas": kind == spacing for kind in ("karras", "exponential")} if "karras" in CASES[name][2] else {}
    scheduler.register_to_config(timestep_spacing=spacing if spacing in ON_T else "linspace", **sigmas)
    scheduler.set_timesteps(n)
    return scheduler


@cache
def stepper(name):
    """Our step, compiled once for all grids: the row is data."""

    @jax.jit
    def step(sampler, x, state, s, keys):
        denoise = lambda x, s: (model(jnp.tanh, x, s.t), None)  # noqa: E731
        x, state, _ = sampler.step(denoise, x, state, s, keys)
        return x, state

    return step


def rows(steps):
    return (jax.tree.map(lambda v: v[i], steps) for i in range(len(steps.i)))


@pytest.mark.parametrize("name, spacing, n", ALL)
def test_steps(name, spacing, n, monkeypatch):
    if n == 1 and name not in ("dpmpp_2m", "dpmpp_2m_sde", "unipc") and spacing not in ON_T:
        pytest.skip("diffusers' single step starts at the lowest level here, ours at the highest")
    keys = jax.vmap(jax.random.key)(jnp.arange(SHAPE[0]))
    for eta in ETAS.get(name, (0.0,)):
        sampler = make_sampler(name, eta)
        steps = time_grid(NOISE, n, sampler, spacing)
        scheduler = referee(name, spacing, n)
        # float32 timesteps in both; where they are interpolated in log k, the referee's float32 sigmas move them
        np.testing.assert_allclose(scheduler.timesteps.numpy(), steps.t, atol=2e-3)
        worst = run_beside(name, scheduler, sampler, steps, keys, eta, monkeypatch)
        assert worst < TOLERANCE


def run_beside(name, scheduler, sampler, steps, keys, eta, monkeypatch):
    """Largest relative difference after any row, each row started from diffusers' x."""
    exploding = name in VARIANCE_EXPLODING
    x = np.random.default_rng(0).standard_normal(SHAPE)
    theirs = torch.from_numpy(x / steps.alpha[0] if exploding else x)
    state, worst = sampler.init(jnp.asarray(x, jnp.float32)), 0.0
    for number, (t, s) in enumerate(zip(scheduler.timesteps, rows(steps), strict=True)):
        start = (theirs * float(s.alpha) if exploding else theirs).numpy()
        noise = torch.from_numpy(np.array(draw(fold(keys, s.i), jnp.asarray(start))))
        module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
        if hasattr(module, "randn_tensor"):
            monkeypatch.setattr(module, "randn_tensor", lambda *a, noise=noise, **k: noise)
        if name in ("ddim", "plms"):  # their own idea of the next timestep, where it is not the next row's
            last = number == len(steps.i) - 1
            scheduler.num_inference_steps = Fraction(1000, 1001 if last else int(steps.t[0 if number == 1 and name == "plms" else number] - steps.t[1 if number < 2 and name == "plms" else number + 1]))
        out = model(torch.tanh, scheduler.scale_model_input(theirs, t), t.double())
        options = {"eta": eta} if name == "ddim" else {}
        theirs = scheduler.step(out, t, theirs, **options).prev_sample.double()
        ours, state = stepper(name)(sampler, jnp.asarray(start, jnp.float32), state, s, fold(keys, s.i))
        end = (theirs * float(s.alpha_next) if exploding else theirs).numpy()
        worst = max(worst, np.abs(np.asarray(ours) - end).max() / np.abs(end).max())
    return worst
