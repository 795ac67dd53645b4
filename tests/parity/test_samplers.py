"""Every sampler against the diffusers scheduler of its name: timesteps, and then every step from diffusers' own state.

The referee is given its noise table in float64, since in float32 it is 7e-5 off at the image end (1 - 0.99915 has four
good digits), more than all else that is compared here. What is left are its float32 sigmas and coefficients, and ours.
"""

import sys
from fractions import Fraction
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.config import NoiseConfig
from sd_jax.diffusion.draws import draw, fold
from sd_jax.diffusion.samplers import make_sampler
from sd_jax.diffusion.schedule import alpha_sigma, start_at, start_scale, time_grid

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # diffusers' own, by the ten thousand

NOISE = NoiseConfig()
COUNTS = (1, 2, 7, 20, 50)
SHAPE = (2, 4, 4, 3)
TOLERANCE = 5e-6  # of the largest value: a row is a few float32 operations (1.6e-6 at worst, most 3e-7)

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
VARIANCE_PRESERVING = ("plms", "ddim", "ddpm", "dpmpp_2m", "dpmpp_2m_sde", "unipc")
VARIANCE_EXPLODING = ("lms", "euler", "euler_a", "heun", "dpm2", "dpm2_a")
ETAS = {"ddim": (0.0, 0.6, 1.0)}
ALL = [
    (name, spacing, n)
    for name, (_, _, spacings) in CASES.items()
    for spacing in spacings
    for n in COUNTS
    # see test_one_step_on_a_grid_of_levels_starts_from_the_highest
    if not (n == 1 and name in VARIANCE_EXPLODING and spacing not in ON_T)
]


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
    scheduler.register_to_config(timestep_spacing=spacing if spacing in ON_T else "linspace")
    if CASES[name][2] == ON_K:
        scheduler.register_to_config(
            use_karras_sigmas=spacing == "karras", use_exponential_sigmas=spacing == "exponential"
        )
    scheduler.set_timesteps(n)
    return scheduler


@cache
def stepper(name):
    """Our row, and the noise it draws; compiled once for all grids, since the grid is data."""

    def denoise(x, s):
        return model(jnp.tanh, x, s.t), None

    @jax.jit
    def step(sampler, x, state, s, keys):
        keys = fold(keys, s.i)
        x, state, _ = sampler.step(denoise, x, state, s, keys)
        return x, state, draw(keys, x)

    return step


def run_beside(name, scheduler, sampler, steps, eta, monkeypatch):
    """Largest difference after any row, relative to the largest value, each row begun from diffusers' x."""
    keys = jax.vmap(jax.random.key)(jnp.arange(SHAPE[0]))
    exploding = name in VARIANCE_EXPLODING
    x = np.random.default_rng(0).standard_normal(SHAPE)
    theirs = torch.from_numpy(x / steps.alpha[0] if exploding else x)
    state, gap, differences = sampler.init(jnp.asarray(x, jnp.float32)), None, []
    for number, t in enumerate(scheduler.timesteps[-len(steps.i) :]):
        s = jax.tree.map(lambda v, number=number: v[number], steps)
        start = theirs.numpy() * (s.alpha if exploding else 1)
        ours, state, noise = stepper(name)(sampler, jnp.asarray(start, jnp.float32), state, s, keys)
        inject(scheduler, torch.from_numpy(np.array(noise)), monkeypatch)
        if name in ("ddim", "plms"):
            # They step down by ``1000 // num_inference_steps``, which is not the next row on every grid: make it so.
            gap = 1001 if number == len(steps.i) - 1 else int(s.t - s.t_next) or gap
            scheduler.num_inference_steps = Fraction(1000, gap)
        out = model(torch.tanh, scheduler.scale_model_input(theirs, t), t.double())
        theirs = scheduler.step(out, t, theirs, **({"eta": eta} if name == "ddim" else {})).prev_sample.double()
        end = theirs.numpy() * (s.alpha_next if exploding else 1)
        differences.append(np.abs(np.asarray(ours) - end).max() / np.abs(end).max())
    return max(differences)


def inject(scheduler, noise, monkeypatch):
    module = sys.modules[type(scheduler).__module__]
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: noise)


@pytest.mark.parametrize("name, spacing, n", ALL)
def test_rows(name, spacing, n, monkeypatch):
    scheduler = referee(name, spacing, n)
    for eta in ETAS.get(name, (0.0,)):
        sampler = make_sampler(name, eta)
        steps = time_grid(NOISE, n, sampler, spacing)
        # The referee's sigmas are float32, which moves a timestep that is interpolated between them.
        np.testing.assert_allclose(scheduler.timesteps.numpy(), steps.t, atol=2e-3)
        assert run_beside(name, referee(name, spacing, n), sampler, steps, eta, monkeypatch) < TOLERANCE


# Not LMS, whose coefficients diffusers takes at the order of the whole grid while it has the slopes of the slice alone.
@pytest.mark.parametrize(
    "name", [name for name in VARIANCE_PRESERVING + VARIANCE_EXPLODING if name not in ("plms", "lms")]
)
def test_rows_of_a_grid_entered_halfway(name, monkeypatch):
    n, sampler = 10, make_sampler(name)
    start = start_at(n, 0.6)
    steps = time_grid(NOISE, n, sampler, start=start)
    scheduler = referee(name, sampler.grid.spacing, n)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start * scheduler.order)
    np.testing.assert_allclose(scheduler.timesteps[start * scheduler.order :].numpy(), steps.t, atol=2e-3)
    assert run_beside(name, scheduler, sampler, steps, 0.0, monkeypatch) < TOLERANCE


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("spacing", ON_T)
def test_starting_scale(name, spacing):
    sampler = make_sampler(name)
    steps = time_grid(NOISE, 20, sampler, spacing)
    theirs = float(referee(name, spacing, 20).init_noise_sigma)
    theirs *= steps.alpha[0] if name in VARIANCE_EXPLODING else 1
    assert start_scale(NOISE, steps, sampler, spacing) == pytest.approx(theirs, rel=1e-6)


def test_one_step_on_a_grid_of_levels_starts_from_the_highest():
    """diffusers' k-diffusion schedulers start from the lowest, t = 0, where there is no noise to speak of."""
    for name in VARIANCE_EXPLODING:
        assert time_grid(NOISE, 1, make_sampler(name), "karras").t == [999]
