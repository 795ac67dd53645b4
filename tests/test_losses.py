"""train/losses.py and train/state.py: what is minimised, and one step of minimising it."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sd_jax.config import NoiseConfig
from sd_jax.diffusion import schedule
from sd_jax.models.vae import Posterior
from sd_jax.train import losses
from sd_jax.train.losses import NoiseLoss
from sd_jax.train.state import (
    OptimizerConfig,
    ema_decay,
    init_state,
    learning_rate,
    make_optimizer,
    train_step,
)

KEY = jax.random.key(0)
X0 = np.random.default_rng(0).normal(size=(64, 2, 2, 4)).astype(np.float32)


def levels(t):
    """alpha and sigma at timesteps [B], to broadcast against latents."""
    return (
        jnp.asarray(table, jnp.float32)[t.astype(int)][:, None, None, None] for table in schedule.alpha_sigma(NOISE)
    )


NOISE = NoiseConfig()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_perfect_prediction_has_no_loss(prediction):
    def perfect(x, t):
        alpha, sigma = levels(t)
        return schedule.target(prediction, X0, (x - alpha * X0) / sigma, alpha, sigma)

    loss, metrics = losses.diffusion_loss(perfect, X0, KEY, NoiseConfig(prediction=prediction))
    assert loss < 1e-8 and metrics["mse"] < 1e-8  # eps comes back through a division by sigma >= 0.03


def test_min_snr_makes_both_predictions_the_same_loss():
    """Hang et al. 2023: for either target the weights amount to min(snr, gamma) on the error of x0."""
    options = NoiseLoss(min_snr=5.0)

    def guess(prediction):
        def predict(x, t):
            alpha, sigma = levels(t)
            x0 = 0.5 * x
            return schedule.target(prediction, x0, (x - alpha * x0) / sigma, alpha, sigma)

        return losses.diffusion_loss(predict, X0, KEY, NoiseConfig(prediction=prediction), options)[0]

    np.testing.assert_allclose(guess("epsilon"), guess("v_prediction"), rtol=1e-4)  # float32, snr up to 1200


def test_weights_by_hand():
    snr = jnp.array([100.0, 5.0, 1.0, 1 / 16, 1 / 400])
    np.testing.assert_array_equal(losses.weights(snr, "epsilon", NoiseLoss()), 1)
    gamma = NoiseLoss(min_snr=5.0)
    np.testing.assert_allclose(losses.weights(snr, "epsilon", gamma), [0.05, 1, 1, 1, 1], rtol=1e-6)
    expected = [5 / 101, 5 / 6, 1 / 2, 1 / 17, 1 / 401]
    np.testing.assert_allclose(losses.weights(snr, "v_prediction", gamma), expected, rtol=1e-6)
    high = NoiseLoss(high_weight=12.0)
    np.testing.assert_allclose(losses.weights(snr, "epsilon", high), [1, 1, 1, 4, 12], rtol=1e-6)


def timesteps(options):
    seen = []

    def predict(x, t):
        seen.append(np.asarray(t))
        return x

    losses.diffusion_loss(predict, jnp.zeros((4000, 1, 1, 4)), KEY, NOISE, options)
    return seen[0]


def test_where_timesteps_are_drawn():
    plain, mixed = timesteps(NoiseLoss()), timesteps(NoiseLoss(high_share=0.7))
    assert plain.min() >= 0 and plain.max() <= 999 and timesteps(NoiseLoss(high_share=1.0)).min() >= 550
    # 4000 draws: the standard deviation of a share is below 0.008.
    assert abs((plain >= 550).mean() - 0.45) < 0.03
    assert abs((mixed >= 550).mean() - (0.7 + 0.3 * 0.45)) < 0.03


def test_no_key_is_used_twice():
    with jax.debug_key_reuse(True):
        losses.diffusion_loss(lambda x, t: x, X0, jax.random.key(3), NOISE, NoiseLoss(5.0, 0.7, 550, 12.0))


def test_the_autoencoders_loss_by_hand():
    """An autoencoder whose pictures are everywhere 0.5 too bright, and right in all their edges."""
    image = jnp.asarray(np.random.default_rng(1).uniform(-1, 1, (2, 4, 4, 3)), jnp.float32)
    posterior = Posterior(jnp.zeros((2, 1, 1, 4)), jnp.ones((2, 1, 1, 4)), jnp.full((2, 1, 1, 4), 3.0))
    vae = types.SimpleNamespace(apply=lambda _, x, method: posterior if method == "encode" else image + 0.5)
    loss, metrics = losses.vae_loss(vae, {}, image, KEY, kl=0.1, mse=4.0, edges=1.0)
    np.testing.assert_allclose(loss, 0.5 + 4 * 0.25 + 0.1 * 3, rtol=1e-5)
    np.testing.assert_allclose(metrics["psnr"], 10 * np.log10(4 / 0.25), rtol=1e-5)
    vae.apply = lambda _, x, method: posterior if method == "encode" else image.at[:, 1].add(1.0)
    blurred = losses.vae_loss(vae, {}, image, KEY, edges=1.0)[0] - losses.vae_loss(vae, {}, image, KEY)[0]
    np.testing.assert_allclose(blurred, 2 / 3, rtol=1e-5)  # two of the three rows of vertical differences are off by 1


# ---- the step ------------------------------------------------------------------------------------------------------


def linear(params, batch, key):
    x, y = batch
    error = x @ params["w"] - y + 1e-3 * jax.random.normal(key, y.shape)
    return jnp.mean(error**2), {}


def problem():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 3)).astype(np.float32)
    return x, x @ np.array([1.0, -2.0, 0.5], np.float32)


def stepper(**settings):
    config = OptimizerConfig(**{"learning_rate": 0.1, "warmup": 0, "weight_decay": 0.0, "ema": 0.9, **settings})
    optimizer = make_optimizer(config, 100)
    state = init_state({"w": jnp.zeros(3)}, optimizer)
    return state, jax.jit(lambda *args: train_step(*args, loss=linear, optimizer=optimizer, ema=config.ema))


def test_a_step_lowers_the_loss_and_the_average_follows():
    state, step = stepper()
    for _ in range(60):
        state, metrics = step(state, problem(), KEY)
    assert metrics["loss"] < 0.05  # from 5
    assert int(state.step) == 60 and int(state.bad) == 0
    np.testing.assert_allclose(state.params["w"], [1, -2, 0.5], atol=0.2)
    np.testing.assert_allclose(state.ema["w"], state.params["w"], atol=0.1)
    assert not np.array_equal(state.ema["w"], state.params["w"])


def test_each_step_has_its_own_key():
    state, step = stepper(learning_rate=0.0)
    state, first = step(state, problem(), KEY)
    again, second = step(state, problem(), KEY)
    assert first["loss"] != second["loss"] and step(state, problem(), KEY)[1]["loss"] == second["loss"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counters(value):
    x, y = problem()
    before, step = stepper()
    before, _ = step(before, (x, y), KEY)
    after, metrics = step(before, (x, np.where(np.arange(len(y)) == 5, value, y).astype(np.float32)), KEY)
    assert not np.isfinite(metrics["loss"])
    assert (int(after.step), int(after.bad)) == (2, 1)
    assert int(step(after, (x, y), KEY)[0].bad) == 0
    for name in ("params", "ema", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(before, name))


def test_the_state_can_be_donated():
    state = stepper()[0]
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(buffers)) == len(buffers)


def test_the_average_has_a_short_memory_at_first():
    assert ema_decay(0, 0.999) == pytest.approx(0.1) and ema_decay(90, 0.999) == pytest.approx(0.91)
    assert ema_decay(10**6, 0.999) == pytest.approx(0.999)


@pytest.mark.parametrize("decay, middle, end", [("constant", 1.0, 1.0), ("linear", 0.5, 0.0), ("cosine", 0.5, 0.0)])
def test_learning_rates(decay, middle, end):
    rate = learning_rate(OptimizerConfig(1.0, warmup=10, decay=decay), 110)
    np.testing.assert_allclose([rate(i) for i in (0, 5, 10, 60, 110)], [0, 0.5, 1, middle, end], atol=1e-6)


def test_the_gradient_is_clipped():
    optimizer = make_optimizer(OptimizerConfig(1.0, warmup=0, clip=1.0, weight_decay=0.0), 10)
    params = {"w": jnp.zeros(2)}
    _, state = optimizer.update({"w": jnp.array([300.0, 400.0])}, optimizer.init(params), params)
    moment = optax.tree_utils.tree_get(state, "mu")["w"]  # (1 - b1) of the gradient it was given
    np.testing.assert_allclose(moment, [0.06, 0.08], rtol=1e-5)
