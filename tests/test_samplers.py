"""The loop and the samplers, on models whose exact answer is known.

For data of one point, x0 = MU, the network's exact answer is eps = (x - alpha MU) / sigma. For Gaussian data of mean MU
and standard deviation SPREAD it is below, and the probability flow keeps (x - alpha MU) / sqrt(alpha^2 SPREAD^2 +
sigma^2).
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.config import NoiseConfig
from sd_jax.diffusion.draws import POSTERIOR, STARTING, draw, fold, starting_noise
from sd_jax.diffusion.samplers import SAMPLERS, Progress, make_sampler, sample
from sd_jax.diffusion.schedule import Grid, reverse, start_at, time_grid
from sd_jax.types import RequestError, pytree

NOISE = NoiseConfig()
MU, SPREAD = 0.7, 0.5
STOCHASTIC = ("ddpm", "euler_a", "dpm2_a", "dpmpp_2m_sde")
DETERMINISTIC = [name for name in SAMPLERS if name not in STOCHASTIC]
TO_ZERO = [name for name in SAMPLERS if name not in ("plms", "ddim")]


def keys_of(*seeds):
    return jax.vmap(jax.random.key)(jnp.asarray(seeds))


def point(x, s):
    return (x - s.alpha * MU) / s.sigma, None


def gaussian(x, s):
    return s.sigma * (x - s.alpha * MU) / (s.alpha**2 * SPREAD**2 + s.sigma**2), None


def flow(x, steps):
    """Where the probability flow of ``gaussian`` takes x, from the first level of ``steps`` to the last."""
    std = np.hypot(steps.alpha[0] * SPREAD, steps.sigma[0])
    std_end = np.hypot(steps.alpha_next[-1] * SPREAD, steps.sigma_next[-1])
    return steps.alpha_next[-1] * MU + (x - steps.alpha[0] * MU) * std_end / std


def crooked(x, s):
    """A model that is not linear, and different everywhere on the grid."""
    return jnp.tanh(0.8 * x + s.t / 500 - 1) + 0.1 * x, None


@partial(jax.jit, static_argnums=0)
def run(denoise, sampler, x, steps, keys):
    return sample(sampler, denoise, x, steps, keys)[0]


# ---- accuracy ------------------------------------------------------------------------------------------------------

# PLMS takes Adams-Bashforth's weights for equal steps on a grid of unequal ones, which leaves it second-order. LMS,
# whose weights are exact, nears its fourth order slowly, for it begins with an Euler step.
ORDERS = {"plms": 2, "ddim": 1, "lms": 3.5, "euler": 1, "heun": 2, "dpm2": 2, "dpmpp_2m": 2, "unipc": 3}


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order_of_convergence(name):
    class ToTheLowestLevel:  # no step to sigma 0, which is exact or not whatever the number of steps
        grid = dataclasses.replace(SAMPLERS[name].grid, to_zero=False)

    with jax.enable_x64(True):
        x = np.random.default_rng(0).standard_normal((1, 4, 4, 2))
        errors = []
        for n in (40, 80):
            steps = time_grid(NOISE, n, ToTheLowestLevel, "exponential", dtype=np.float64)
            end = run(gaussian, make_sampler(name), x, steps, keys_of(0))
            errors.append(np.abs(end - flow(x, steps)).max())
    assert np.log2(errors[0] / errors[1]) == pytest.approx(ORDERS[name], abs=0.12)


@pytest.mark.parametrize("name", [*STOCHASTIC, "ddim"])
def test_stochastic_samplers_draw_from_the_data(name):
    sampler, seeds = make_sampler(name, eta=1.0 if name == "ddim" else 0.0), range(4)
    steps = time_grid(NOISE, 80, sampler, "karras")
    x = starting_noise(keys_of(*seeds), (64, 64, 1))
    x = run(gaussian, sampler, x, steps, keys_of(*seeds))
    # 16384 draws: standard errors of 0.004 for the mean and 0.003 for the spread. The rest is the 80 steps' error.
    assert float(x.mean()) == pytest.approx(MU, abs=0.02)
    assert float(x.std()) == pytest.approx(SPREAD, abs=0.03)


@pytest.mark.parametrize("name", TO_ZERO)
@pytest.mark.parametrize("n", [1, 4])
def test_the_step_to_sigma_zero_is_exact(name, n):
    sampler = make_sampler(name)
    x = starting_noise(keys_of(0), (4, 4, 2))
    end = run(point, sampler, x, time_grid(NOISE, n, sampler, "trailing"), keys_of(0))
    np.testing.assert_allclose(end, MU, atol=2e-5)  # float32, with x0 seen through 14.6 times its size in noise


@pytest.mark.parametrize("name", ["ddim", "plms"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_the_ddim_family_ends_on_the_first_training_level(name, strength):
    """Also when entered halfway: PLMS that doubled a step it did not run would end with twice the noise."""
    steps = time_grid(NOISE, 50, make_sampler(name), start=start_at(50, strength))
    noise = starting_noise(keys_of(0), (8, 8, 4))
    x = steps.alpha[0] * MU + steps.sigma[0] * noise
    end = run(point, make_sampler(name), x, steps, keys_of(0))
    np.testing.assert_allclose(end, steps.alpha_next[-1] * MU + 0.029155 * noise, atol=2e-5)


def test_ddpm_is_the_posterior():
    """Ho et al. 2020, eq. 7, which the sampler has in DDIM's form."""
    steps = time_grid(NOISE, 20, SAMPLERS["ddpm"])
    s = jax.tree.map(lambda v: jnp.asarray(v[7]), steps)
    x, keys = starting_noise(keys_of(0), (4, 4, 2)), keys_of(5)
    got, _, _ = make_sampler("ddpm").step(crooked, x, (), s, keys)
    abar, abar_next = float(s.alpha) ** 2, float(s.alpha_next) ** 2
    beta = 1 - abar / abar_next
    x0 = (x - s.sigma * crooked(x, s)[0]) / s.alpha
    mean = s.alpha_next * beta / (1 - abar) * x0 + (1 - beta) ** 0.5 * (1 - abar_next) / (1 - abar) * x
    variance = (1 - abar_next) / (1 - abar) * beta
    np.testing.assert_allclose(got, mean + variance**0.5 * draw(keys, x), atol=1e-5)


def test_inversion_there_and_back():
    """DDIM is Euler's method, so the way back misses by one order of the step: halving it halves the error."""
    x0, errors = 0.9 * starting_noise(keys_of(0), (4, 4, 2)) + 0.2, []
    for n in (50, 100):
        steps = time_grid(NOISE, n, make_sampler("ddim"))
        up = run(gaussian, make_sampler("ddim"), x0, reverse(steps), keys_of(0))
        np.testing.assert_allclose(flow(up, steps), x0, atol=0.35)
        down = run(gaussian, make_sampler("ddim"), up, steps, keys_of(0))
        errors.append(float(jnp.abs(down - x0).max()))
    assert errors[1] < 0.6 * errors[0] < 0.2


def test_inversion_from_an_image_without_noise():
    steps = time_grid(dataclasses.replace(NOISE, final_alpha_one=True), 20, make_sampler("ddim"))
    up = run(gaussian, make_sampler("ddim", 1.0), jnp.ones((1, 2, 2, 1)), reverse(steps), keys_of(0))
    assert jnp.isfinite(up).all()


# ---- the loop ------------------------------------------------------------------------------------------------------


@pytree
class Still:
    """A sampler that reports what it was given, and leaves x where it is."""

    grid = Grid()

    def init(self, x):
        return ()

    def step(self, denoise, x, state, s, keys):
        return x, state, draw(keys, x)


def test_draws_belong_to_the_image_and_the_step():
    def noises(seeds, start):
        x = jnp.zeros((len(seeds), 4, 4, 2))
        steps = time_grid(NOISE, 6, Still(), start=start)
        return sample(Still(), crooked, x, steps, keys_of(*seeds), collect=lambda x, s, aux: aux)[1]

    together = noises([3, 4, 5], 0)
    np.testing.assert_array_equal(together[:, 1:2], noises([4], 0))
    np.testing.assert_array_equal(together[2:], noises([3, 4, 5], 2))
    np.testing.assert_array_equal(together[4], draw(fold(keys_of(3, 4, 5), 4), jnp.zeros((3, 4, 4, 2))))
    assert len(np.unique(together)) == together.size


def test_streams_outside_the_loop():
    keys = keys_of(1, 2, 3)
    noise = starting_noise(keys, (4, 4, 2))
    assert noise.shape == (3, 4, 4, 2) and noise.dtype == jnp.float32
    np.testing.assert_array_equal(noise[2:], starting_noise(keys_of(3), (4, 4, 2)))
    np.testing.assert_array_equal(noise, draw(fold(keys, STARTING), noise))
    assert not np.isin(noise, draw(fold(keys, POSTERIOR), noise)).any()
    # The layout and the generator are frozen: every seed's picture hangs on these bits.
    np.testing.assert_array_equal(
        noise[0], jax.random.normal(jax.random.fold_in(jax.random.key(1), 2**31 - 1), (4, 4, 2))
    )


@pytest.mark.parametrize("name", ["plms", "dpm2_a", "dpmpp_2m_sde", "unipc"])
def test_an_image_depends_on_itself_alone(name):
    sampler = make_sampler(name)
    steps, keys = time_grid(NOISE, 5, sampler), keys_of(7, 8, 9)
    x = starting_noise(keys, (4, 4, 2))
    together = run(crooked, sampler, x, steps, keys)
    alone = run(crooked, sampler, x[1:2], steps, keys[1:2])
    np.testing.assert_allclose(together[1:2], alone, atol=1e-5)  # the noise is the same; sums may be grouped otherwise
    assert jnp.isfinite(together).all() and together.dtype == jnp.float32


def test_collect_and_aux():
    steps = time_grid(NOISE, 4, SAMPLERS["heun"])
    denoise = lambda x, s: (crooked(x, s)[0], {"t": s.t})  # noqa: E731
    x, seen = sample(
        make_sampler("heun"),
        denoise,
        jnp.ones((2, 4, 4, 1)),
        steps,
        keys_of(0, 1),
        collect=lambda x, s, aux: (x, s.i, aux["t"]),
    )
    assert seen[0].shape == (7, 2, 4, 4, 1)
    np.testing.assert_array_equal(seen[0][-1], x)
    np.testing.assert_array_equal(seen[1], steps.i)
    np.testing.assert_array_equal(seen[2], steps.t)


def test_half_precision_comes_out_as_float32():
    steps = time_grid(NOISE, 3, SAMPLERS["dpmpp_2m"])
    denoise = lambda x, s: (crooked(x, s)[0].astype(jnp.bfloat16), None)  # noqa: E731
    x, _ = sample(make_sampler("dpmpp_2m"), denoise, jnp.ones((1, 2, 2, 1), jnp.bfloat16), steps, keys_of(0))
    assert x.dtype == jnp.float32


def test_progress_does_not_compile_anew_nor_change_the_result():
    traces, progress = [], Progress()

    @jax.jit
    def watched(x, keys):
        traces.append(1)
        return sample(make_sampler("heun"), crooked, x, time_grid(NOISE, 4, SAMPLERS["heun"]), keys, on_step=progress)[
            0
        ]

    x, keys, heard = jnp.ones((1, 2, 2, 1)), keys_of(0), ([], [])
    silent = watched(x, keys)
    for listener in heard:
        progress.listener = listener.append
        np.testing.assert_array_equal(watched(x, keys), silent)
        jax.effects_barrier()
    assert len(traces) == 1
    assert sorted(heard[0]) == sorted(heard[1]) == list(range(7))


@pytree
class Own:
    """A user's sampler: ancestral DDIM written from the paper, with no time grid of its own."""

    eta: float

    def init(self, x):
        return ()

    def step(self, denoise, x, state, s, keys):
        eps, aux = denoise(x, s)
        x0 = (x - s.sigma * eps) / s.alpha
        ratio = (s.alpha * s.sigma_next) / (s.alpha_next * s.sigma)
        std = self.eta * s.sigma_next * jnp.sqrt(1 - ratio**2)
        x = s.alpha_next * x0 + jnp.sqrt(s.sigma_next**2 - std**2) * eps
        return x + std * draw(keys, x), state, aux


def test_a_sampler_of_ones_own():
    x, keys = starting_noise(keys_of(0, 1), (4, 4, 2)), keys_of(0, 1)
    ours = run(crooked, make_sampler("ddim", 0.5), x, time_grid(NOISE, 6, SAMPLERS["ddim"]), keys)
    np.testing.assert_allclose(run(crooked, Own(0.5), x, time_grid(NOISE, 6, Own), keys), ours, atol=1e-5)


# ---- transformations -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLERS)
def test_gradients_are_finite(name):
    """With respect to the start, the levels and eta; also at the infinite log ratio of sigma 0, and at eta 0 and 1."""
    steps = time_grid(dataclasses.replace(NOISE, final_alpha_one=True), 4, SAMPLERS[name])
    steps = jax.tree.map(jnp.asarray, steps)
    x, keys = starting_noise(keys_of(0), (2, 2, 1)), keys_of(0)

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1, 2))
    def loss(sampler, x, levels):
        alpha, sigma, alpha_next, sigma_next = levels
        grid = steps.replace(alpha=alpha, sigma=sigma, alpha_next=alpha_next, sigma_next=sigma_next)
        return jnp.sum(sample(sampler, crooked, x, grid, keys)[0] ** 2)

    levels = (steps.alpha, steps.sigma, steps.alpha_next, steps.sigma_next)
    for eta in (0.0, 1.0) if name == "ddim" else (0.0,):
        value, slopes = loss(make_sampler(name, eta), x, levels)
        assert np.isfinite(value)
        assert all(jnp.isfinite(v).all() for v in jax.tree.leaves(slopes))
        assert jnp.abs(slopes[1]).min() > 0


@pytest.mark.parametrize("name", ["ddim", "plms", "unipc"])
def test_values_do_not_compile_anew(name):
    traces = []

    @jax.jit
    def counted(sampler, x, steps, keys):
        traces.append(1)
        return sample(sampler, crooked, x, steps, keys)[0]

    ends = [
        counted(
            make_sampler(name, eta), jnp.ones((1, 2, 2, 1)), time_grid(NOISE, 5, SAMPLERS[name], spacing), keys_of(seed)
        )
        for eta in ((0.0, 0.3) if name == "ddim" else (0.0,))
        for spacing in ("leading", "karras")
        for seed in (0, 1)
    ]
    assert len(traces) == 1
    assert not np.array_equal(ends[0], ends[2])


@pytest.mark.parametrize("name", ["unipc", "dpm2_a"])
def test_the_same_under_vmap_pmap_and_shard_map(name):
    sampler, keys = make_sampler(name), keys_of(*range(8))
    steps, x = time_grid(NOISE, 4, sampler), starting_noise(keys, (2, 2, 1))
    one = lambda x, keys: sample(sampler, crooked, x, steps, keys)[0]  # noqa: E731
    plain = run(crooked, sampler, x, steps, keys)
    apart = (x[:, None], keys[:, None])
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    sharded = jax.jit(jax.shard_map(one, mesh=mesh, in_specs=(spec, spec), out_specs=spec))(x, keys)
    # float32, fused in other ways
    np.testing.assert_allclose(jax.vmap(one)(*apart)[:, 0], plain, atol=1e-5)
    np.testing.assert_allclose(jax.pmap(one)(*apart)[:, 0], plain, atol=1e-5)
    np.testing.assert_allclose(sharded, plain, atol=1e-5)


def test_no_sampler_is_taken_for_another():
    """jit finds a compiled program by the structure of its arguments."""
    samplers = [*map(make_sampler, SAMPLERS), Still(), Own(0.0)]
    structures = [jax.tree.structure(sampler) for sampler in samplers]
    assert all(a != b for i, a in enumerate(structures) for b in structures[:i])
    assert jax.tree.structure(make_sampler("ddim", 0.1)) == jax.tree.structure(make_sampler("ddim", 0.9))
    assert jax.tree.map(lambda v: v + 1, Own(1.0)) == Own(2.0)


# ---- names ---------------------------------------------------------------------------------------------------------


def test_names():
    assert make_sampler("ddim", 0.5).eta == 0.5
    with pytest.raises(RequestError, match="'dpm3'.*plms, ddim"):
        make_sampler("dpm3")
    with pytest.raises(RequestError, match="'euler' has no eta.*0.5"):
        make_sampler("euler", 0.5)


def test_eta_may_be_traced():
    x, steps = jnp.ones((1, 2, 2, 1)), time_grid(NOISE, 3, SAMPLERS["ddim"])
    made_inside = jax.jit(
        lambda name, eta: run(crooked, make_sampler(name, eta), x, steps, keys_of(0)), static_argnums=0
    )
    np.testing.assert_allclose(made_inside("ddim", 0.5), run(crooked, make_sampler("ddim", 0.5), x, steps, keys_of(0)))
