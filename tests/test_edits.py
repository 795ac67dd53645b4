"""Edits of the latents between steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.config import NoiseConfig
from sd_jax.diffusion.draws import starting_noise
from sd_jax.diffusion.edits import Chain, Inpaint, composite
from sd_jax.diffusion.samplers import make_sampler, sample
from sd_jax.diffusion.schedule import time_grid
from sd_jax.types import pytree

NOISE = NoiseConfig()
KEYS = jax.vmap(jax.random.key)(jnp.arange(2))
EPS = starting_noise(KEYS, (4, 4, 3))
KNOWN = jnp.linspace(-1, 1, EPS.size).reshape(EPS.shape)
MASK = jnp.zeros((2, 4, 4, 1)).at[:, :2].set(1.0)


def denoise(x, s):
    return jnp.tanh(x), None


@pytree
class Count:
    """Adds one, and remembers what it has seen."""

    def init(self, x):
        return jnp.zeros_like(x)

    def update(self, x, memory, s, aux):
        return x + 1, memory + x


@pytest.mark.parametrize("name", ["ddim", "plms", "heun", "dpm2", "unipc"])
def test_outside_the_mask_are_the_known_latents_at_the_level_each_row_ends_on(name):
    sampler = make_sampler(name)
    steps = time_grid(NOISE, 6, sampler)
    edit = Inpaint(MASK, KNOWN, EPS)
    x, seen = sample(sampler, denoise, EPS, steps, KEYS, edit, collect=lambda x, s, aux: x)
    for row, alpha, sigma in zip(seen, steps.alpha_next, steps.sigma_next, strict=True):
        np.testing.assert_allclose(row[:, 2:], (alpha * KNOWN + sigma * EPS)[:, 2:], atol=1e-6)
    free, _ = sample(sampler, denoise, EPS, steps, KEYS)
    np.testing.assert_allclose(x[:, :2], free[:, :2], atol=1e-6)  # this model does not look at its neighbours


def test_composite_is_exact():
    x = composite(EPS, KNOWN, MASK)
    np.testing.assert_array_equal(x[:, :2], EPS[:, :2])
    np.testing.assert_array_equal(x[:, 2:], KNOWN[:, 2:])
    half = composite(EPS, KNOWN, jnp.full_like(MASK, 0.5))
    np.testing.assert_allclose(half, (EPS + KNOWN) / 2, atol=1e-6)
    assert composite(EPS.astype(jnp.bfloat16), KNOWN, MASK.astype(bool)).dtype == jnp.bfloat16


def test_masks_and_images_do_not_compile_anew():
    traces = []
    steps = time_grid(NOISE, 3, make_sampler("ddim"))

    @jax.jit
    def run(edit):
        traces.append(1)
        return sample(make_sampler("ddim"), denoise, EPS, steps, KEYS, edit)[0]

    assert not np.array_equal(run(Inpaint(MASK, KNOWN, EPS)), run(Inpaint(1 - MASK, -KNOWN, EPS)))
    assert len(traces) == 1


def test_a_chain_runs_in_order_and_keeps_each_memory():
    s = jax.tree.map(lambda v: v[0], time_grid(NOISE, 3, make_sampler("ddim")))
    chain = Chain((Count(), Inpaint(MASK, KNOWN, EPS), Count()))
    x, memory = chain.update(EPS, chain.init(EPS), s, None)
    x, memory = chain.update(x, memory, s, None)
    known = s.alpha_next * KNOWN + s.sigma_next * EPS
    np.testing.assert_allclose(x[:, 2:], (known + 1)[:, 2:], atol=1e-6)
    np.testing.assert_allclose(x[:, :2], (EPS + 4)[:, :2], atol=1e-6)
    np.testing.assert_allclose(memory[0][:, :2], (2 * EPS + 2)[:, :2], atol=1e-6)
    np.testing.assert_allclose(memory[2][:, 2:], (2 * known)[:, 2:], atol=1e-6)
    assert memory[1] == ()


def test_a_chain_in_the_loop():
    sampler = make_sampler("euler")
    steps = time_grid(NOISE, 3, sampler)
    chained, _ = sample(sampler, denoise, EPS, steps, KEYS, Chain((Inpaint(MASK, KNOWN, EPS),)))
    alone, _ = sample(sampler, denoise, EPS, steps, KEYS, Inpaint(MASK, KNOWN, EPS))
    np.testing.assert_array_equal(chained, alone)
