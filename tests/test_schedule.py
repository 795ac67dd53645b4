"""The noise table, the forward process, and time grids."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.config import NoiseConfig
from sd_jax.diffusion.samplers import SAMPLERS
from sd_jax.diffusion.schedule import (
    SPACINGS,
    alpha_sigma,
    q_sample,
    reverse,
    start_at,
    start_scale,
    target,
    time_grid,
    to_eps,
    to_x0,
)
from sd_jax.types import RequestError, Step

NOISE = NoiseConfig()
DOUBLING = ("plms", "heun", "dpm2", "dpm2_a")


def test_the_table_is_v1_4s():
    """abar and k-diffusion's sigma at both ends, as the released model has them."""
    alpha, sigma = alpha_sigma(NOISE)
    assert alpha.dtype == sigma.dtype == np.float64 and alpha.shape == sigma.shape == (1000,)
    assert alpha[0] ** 2 == pytest.approx(0.99915, abs=1e-12)
    assert alpha[-1] ** 2 == pytest.approx(0.0046601, abs=1e-7)
    assert (sigma / alpha)[[0, -1]] == pytest.approx([0.029167, 14.6146], rel=2e-5)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-14)


def test_a_linear_table_and_an_unknown_one():
    alpha, _ = alpha_sigma(dataclasses.replace(NOISE, beta_schedule="linear"))
    assert alpha[1] ** 2 == pytest.approx((1 - 0.00085) * (1 - 0.00085 - 0.01115 / 999))
    with pytest.raises(RequestError, match="cosine"):
        alpha_sigma(dataclasses.replace(NOISE, beta_schedule="cosine"))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_predictions_convert_back(prediction):
    x0, eps = np.random.default_rng(0).standard_normal((2, 3, 4, 4, 2))
    alpha, sigma = 0.6, 0.8
    x = q_sample(x0, eps, alpha, sigma)
    s = Step(i=0, t=0, alpha=alpha, sigma=sigma, t_next=0, alpha_next=1, sigma_next=0)
    out = target(prediction, x0, eps, alpha, sigma)
    np.testing.assert_allclose(to_eps(prediction, out, x, s), eps, atol=1e-14)
    np.testing.assert_allclose(to_x0(eps, x, s), x0, atol=1e-14)


def test_an_unknown_prediction_is_refused():
    for call in (lambda: to_eps("sample", 0, 0, None), lambda: target("sample", 0, 0, 0, 0)):
        with pytest.raises(RequestError, match="sample"):
            call()


def test_v1_4s_own_grid():
    steps = time_grid(NOISE, 50, SAMPLERS["plms"])
    assert len(steps.t) == 51
    assert list(steps.t[:4]) == [981, 961, 961, 941] and list(steps.t[-2:]) == [21, 1]
    assert list(steps.i[:4]) == [0, 0, 1, 2] and steps.i[-1] == 49
    assert steps.sigma_next[-1] == np.float32(alpha_sigma(NOISE)[1][0])  # the residual noise of the reference


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("n", [1, 2, 3, 10, 33, 100])
def test_rows_are_a_chain(name, spacing, n):
    """Each row begins where the one before it ended, on the table's levels, and no noise is added on the way."""
    steps = time_grid(NOISE, n, SAMPLERS[name], spacing)
    extra = {"plms": n > 1, "heun": n - 1, "dpm2": n - 1, "dpm2_a": n - 1}.get(name, 0)
    assert len(steps.i) == n + extra and steps.i.dtype == np.int32
    assert all(v.dtype == np.float32 for v in (steps.t, steps.alpha, steps.sigma, steps.t_next))
    np.testing.assert_array_equal(steps.t_next[:-1], steps.t[1:])
    np.testing.assert_array_equal(steps.sigma_next[:-1], steps.sigma[1:])
    np.testing.assert_array_equal(steps.alpha_next[:-1], steps.alpha[1:])
    np.testing.assert_allclose(steps.alpha**2 + steps.sigma**2, 1, rtol=3e-7)
    assert np.all(steps.sigma_next <= steps.sigma)
    assert set(steps.i) == set(range(n))
    assert 0 <= steps.t.min() and steps.t.max() <= 999
    assert steps.sigma_next[-1] == (np.float32(alpha_sigma(NOISE)[1][0]) if name in ("plms", "ddim") else 0)
    # alpha and sigma are those of t: exactly at whole timesteps, unless a scheduler rounded t on a grid of levels
    if spacing in ("leading", "trailing"):
        whole = steps.t == np.round(steps.t)
        expected = alpha_sigma(NOISE)[1][steps.t[whole].astype(int)]
        np.testing.assert_allclose(steps.sigma[whole], expected, rtol=1e-6)


@pytest.mark.parametrize("name", SAMPLERS)
def test_entering_halfway_leaves_the_rest_of_the_grid(name):
    whole, rest = time_grid(NOISE, 10, SAMPLERS[name]), time_grid(NOISE, 10, SAMPLERS[name], start=4)
    if name == "plms":  # the first step of those that are run is the doubled one
        assert list(rest.i) == [4, 4, 5, 6, 7, 8, 9]
        assert rest.t[0] == whole.t[5] and rest.t[1] == rest.t[2] == whole.t[6]
        assert len(time_grid(NOISE, 10, SAMPLERS[name], start=9).i) == 1
        return
    for a, b in zip(dataclasses.astuple(whole), dataclasses.astuple(rest), strict=True):
        np.testing.assert_array_equal(a[whole.i >= 4], b)


def test_spacing_comes_from_the_request_then_the_checkpoint_then_the_sampler():
    trailing = dataclasses.replace(NOISE, spacing="trailing")
    euler = SAMPLERS["euler"]
    assert time_grid(NOISE, 10, euler).t[-1] == 0  # linspace
    assert time_grid(NOISE, 10, SAMPLERS["ddim"]).t[0] == 901  # leading, one up
    assert time_grid(trailing, 10, euler).t[-1] == 99
    assert time_grid(trailing, 10, euler, "leading").t[-1] == 1


def test_final_alpha_one():
    noise = dataclasses.replace(NOISE, final_alpha_one=True)
    for spacing in SPACINGS:
        assert time_grid(noise, 10, SAMPLERS["ddim"], spacing).sigma_next[-1] == 0


def test_karras_levels():
    """Karras et al. 2022, eq. 5, between the ends of the training table."""
    steps = time_grid(NOISE, 9, SAMPLERS["euler"], "karras")
    k = steps.sigma / steps.alpha
    alpha, sigma = alpha_sigma(NOISE)
    low, high = (sigma / alpha)[[0, -1]] ** (1 / 7)
    np.testing.assert_allclose(k, (high + np.arange(9) / 8 * (low - high)) ** 7, rtol=2e-6)
    exponential = time_grid(NOISE, 9, SAMPLERS["euler"], "exponential")
    ratios = np.diff(np.log(exponential.sigma / exponential.alpha))
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-5)


@pytest.mark.parametrize("n", [0, -1, 1001, 10**12, 2.5, "20", True, None])
def test_counts_that_are_none(n):
    with pytest.raises(RequestError, match="whole number from 1 to 1000"):
        time_grid(NOISE, n, SAMPLERS["ddim"])


@pytest.mark.parametrize("name, spacing, n, most", [("ddim", None, 1000, 999), ("dpmpp_2m", "leading", 999, 998)])
def test_counts_past_the_table(name, spacing, n, most):
    """With an offset of 1, index 1000 would be read, which an array of 1000 clamps in silence."""
    with pytest.raises(RequestError, match=f"at most {most} steps"):
        time_grid(NOISE, n, SAMPLERS[name], spacing)
    assert time_grid(NOISE, most, SAMPLERS[name], spacing).t.max() <= 999


def test_unknown_spacing_and_start():
    with pytest.raises(RequestError, match="'cosine'.*karras"):
        time_grid(NOISE, 10, SAMPLERS["ddim"], "cosine")
    for start in (-1, 10):
        with pytest.raises(RequestError, match="start"):
            time_grid(NOISE, 10, SAMPLERS["ddim"], start=start)


def test_strength():
    """diffusers' ``get_timesteps``: min(int(n * strength), n) steps are run."""
    assert [start_at(50, s) for s in (1.0, 0.8, 0.5, 0.02)] == [0, 10, 25, 49]
    for strength in (0, -0.1, 1.01, float("nan"), 0.01, "0.5", None):
        with pytest.raises(RequestError, match="strength"):
            start_at(50, strength)
    for n in (0, -3, 2.5, "20", None):
        with pytest.raises(RequestError, match="steps .* whole number from 1 up"):
            start_at(n, 0.8)


def test_the_least_strength_that_is_advised_runs_a_step():
    for n in range(2, 1001):
        with pytest.raises(RequestError, match="give at least") as refusal:
            start_at(n, 0.9 / n)
        assert start_at(n, float(str(refusal.value).split()[-1])) == n - 1


def test_reverse():
    down = time_grid(NOISE, 10, SAMPLERS["ddim"])
    up = reverse(down)
    assert list(up.i) == list(range(9, -1, -1))
    np.testing.assert_array_equal(up.sigma_next[:-1], up.sigma[1:])
    assert up.sigma[0] == down.sigma_next[-1] and up.t[0] == 0 and up.t_next[-1] == down.t[0]
    for a, b in zip(dataclasses.astuple(reverse(up)), dataclasses.astuple(down), strict=True):
        np.testing.assert_array_equal(a, b)
    for name in DOUBLING:
        with pytest.raises(RequestError, match="reversed"):
            reverse(time_grid(NOISE, 10, SAMPLERS[name]))


def test_a_sampler_without_a_grid_gets_ddims():
    class Own:
        pass

    for a, b in zip(
        dataclasses.astuple(time_grid(NOISE, 10, Own())),
        dataclasses.astuple(time_grid(NOISE, 10, SAMPLERS["ddim"])),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_the_starting_scale():
    for name, expected in (("ddim", 1), ("dpmpp_2m", 1), ("euler", 0.997667)):
        steps = time_grid(NOISE, 10, SAMPLERS[name])
        assert start_scale(NOISE, steps, SAMPLERS[name]) == pytest.approx(expected, abs=1e-6)
    assert start_scale(NOISE, steps, SAMPLERS["euler"], "leading") == 1
    assert jnp.asarray(start_scale(NOISE, steps, SAMPLERS["euler"])).dtype == jnp.float32
