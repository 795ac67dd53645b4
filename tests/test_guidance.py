"""Guidance, and the network's output made into noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.diffusion.guidance import combine, denoiser
from sd_jax.types import Step

B, SHAPE = 3, (3, 4, 4, 2)
S = Step(*map(jnp.asarray, (1, 500.0, 0.6, 0.8, 480.0, 0.8, 0.6)))
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal(SHAPE), jnp.float32)
PAIR = jnp.asarray(RNG.standard_normal((B, 2, 4, 4, 2)), jnp.float32)
CONTEXT = jnp.asarray(RNG.standard_normal((B, 2, 5, 3)), jnp.float32)
SCALE = jnp.asarray([1.0, 7.5, 3.0])


def net(x, t, context, s):
    """Differs between passes through the context, and tells what it saw."""
    return x[..., :2] * context.mean((2, 3))[:, :, None, None, None] + t / 1000, (x, t, context)


def test_guidance_by_hand_with_a_scale_for_each_image():
    eps, (seen, t, context) = denoiser(net, CONTEXT, SCALE)(X, S)
    assert seen.shape == (B, 2, 4, 4, 2) and t == 500 and context is CONTEXT
    np.testing.assert_array_equal(seen[:, 0], seen[:, 1])
    for i in range(B):
        without, given = (X[i] * CONTEXT[i, p].mean() + 0.5 for p in (0, 1))
        np.testing.assert_allclose(eps[i], without + SCALE[i] * (given - without), rtol=1e-4, atol=1e-5)


def test_scale_one_is_the_single_pass():
    eps, (seen, _, context) = denoiser(net, CONTEXT, 7.5, guided=False)(X, S)
    assert seen.shape == (B, 1, 4, 4, 2) and context.shape == (B, 1, 5, 3)
    np.testing.assert_allclose(eps, denoiser(net, CONTEXT, 1.0)(X, S)[0], atol=1e-6)
    np.testing.assert_array_equal(eps, denoiser(net, CONTEXT[:, 1:], guided=False)(X, S)[0])


def test_guidance_needs_pairs():
    with pytest.raises(ValueError, match="pairs"):
        denoiser(net, CONTEXT[:, 1:], 7.5)(X, S)


def test_half_precision_is_combined_in_float32():
    """At scale 20 bfloat16's 8 bits would leave errors of the size of the signal's tenth."""
    half = PAIR.astype(jnp.bfloat16)
    eps, _ = denoiser(lambda x, t, context, s: (half, None), CONTEXT, 20.0)(X, S)
    assert eps.dtype == jnp.float32
    exact = np.asarray(half, np.float64)
    np.testing.assert_allclose(eps, exact[:, 0] + 20 * (exact[:, 1] - exact[:, 0]), atol=1e-5)


def test_rescale():
    """Lin et al. 2023, section 3.4, for each image on its own."""
    plain = combine(PAIR, SCALE)
    np.testing.assert_allclose(combine(PAIR, SCALE, 0.0), plain, atol=1e-6)
    full = combine(PAIR, SCALE, 1.0)
    np.testing.assert_allclose(full.std((1, 2, 3)), PAIR[:, 1].std((1, 2, 3)), rtol=1e-5)
    phi = jnp.asarray([0.0, 0.7, 1.0])
    expected = phi[:, None, None, None] * full + (1 - phi[:, None, None, None]) * plain
    np.testing.assert_allclose(combine(PAIR, SCALE, phi), expected, atol=1e-5)


def test_rescale_acts_on_what_the_network_puts_out():
    fixed = lambda x, t, context, s: (PAIR, None)  # noqa: E731
    eps, _ = denoiser(fixed, CONTEXT, SCALE, rescale=0.7, prediction="v_prediction")(X, S)
    np.testing.assert_allclose(eps, 0.6 * combine(PAIR, SCALE, 0.7) + 0.8 * X, atol=1e-5)


def test_rescaling_a_constant_has_finite_gradients():
    slope = jax.grad(lambda pair: combine(pair, 7.5, 0.7).sum())(jnp.ones((1, 2, 4, 4, 2)))
    assert jnp.isfinite(slope).all()


def test_v_prediction_is_converted_once():
    x0, noise = PAIR[:, 0], PAIR[:, 1]
    x = S.alpha * x0 + S.sigma * noise
    v = S.alpha * noise - S.sigma * x0
    eps, _ = denoiser(lambda *_: (v[:, None], None), CONTEXT, guided=False, prediction="v_prediction")(x, S)
    np.testing.assert_allclose(eps, noise, atol=1e-6)


def test_extra_channels_come_after_the_latents():
    extra = jnp.arange(B * 4 * 4 * 5, dtype=jnp.float32).reshape(B, 4, 4, 5)
    _, (seen, _, _) = denoiser(net, CONTEXT, 7.5, extra=extra)(X, S)
    for p in (0, 1):
        np.testing.assert_array_equal(seen[:, p], jnp.concatenate([X, extra], -1))


def test_a_context_for_each_step():
    stack = jnp.stack([0 * CONTEXT, CONTEXT, 2 * CONTEXT])
    eps, _ = denoiser(net, stack, 7.5)(X, S)
    np.testing.assert_array_equal(eps, denoiser(net, CONTEXT, 7.5)(X, S)[0])
    past = S.replace(i=jnp.int32(3))
    assert jnp.isnan(denoiser(net, stack, 7.5)(X, past)[0]).all()  # not the last one again, in silence


def test_scale_and_rescale_do_not_compile_anew():
    traces = []

    @jax.jit
    def run(scale, rescale):
        traces.append(1)
        return denoiser(net, CONTEXT, scale, rescale=rescale)(X, S)[0]

    assert not np.array_equal(run(SCALE, 0.5), run(2 * SCALE, 0.1))
    assert len(traces) == 1
