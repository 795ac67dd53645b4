"""Properties of the text tower, the UNet and the VAE that need no reference to be checked against."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.config import NANO, SD_V1_4, UNetConfig
from sd_jax.models.clip import CLIPText
from sd_jax.models.layers import Upsample
from sd_jax.models.unet import TimeEmbedding, UNet, sinusoids
from sd_jax.models.vae import VAE, Posterior
from tests.random_weights import noise, params_like

SMALL = UNetConfig(
    widths=(16, 32), layers=1, attention=(True, False), heads=(2, 2), context_width=16, groups=4, sample_size=8
)
# Two float32 programs for the same function: XLA orders their sums differently.
SAME = 1e-5


def close(a, b, tolerance=SAME):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module, args, count, tensors",
    [
        (CLIPText(SD_V1_4.clip), [(1, 77)], 123_060_480, 196),
        (UNet(SD_V1_4.unet), [(1, 64, 64, 4), (1,), (1, 77, 768)], 859_520_964, 686),
        (VAE(SD_V1_4.vae), [(1, 64, 64, 3)], 83_653_863, 248),
    ],
    ids=["clip", "unet", "vae"],
)
def test_v1_4_has_the_published_number_of_parameters(module, args, count, tensors):
    arrays = [jnp.zeros(shape, int if len(shape) == 2 else jnp.float32) for shape in args]
    leaves = jax.tree.leaves(jax.eval_shape(module.init, jax.random.key(0), *arrays))
    assert (sum(a.size for a in leaves), len(leaves)) == (count, tensors)
    assert {a.dtype for a in leaves} == {jnp.dtype(jnp.float32)}


# ---- text tower ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip_params(nano_params):
    return {"params": nano_params["clip"]}


def test_a_token_is_seen_by_itself_and_later_positions_only(clip_params):
    """Causality through gradients: with distinct tokens, a row of the embedding table stands for a position."""
    length = 9
    tokens = jnp.arange(20, 20 + length)[None]

    def outputs(table):
        p = dict(clip_params["params"], token_embedding={"embedding": table})
        # Weighted, because the plain sum over a normalised axis hardly depends on its input.
        return CLIPText(NANO.clip).apply({"params": p}, tokens)[0] @ noise("w", (NANO.clip.width,))

    jacobian = jax.jit(jax.jacrev(outputs))(jnp.asarray(clip_params["params"]["token_embedding"]["embedding"]))
    depends = np.abs(jacobian[:, 20 : 20 + length]).max(-1) > 0
    np.testing.assert_array_equal(depends, np.tril(np.ones((length, length), bool)))


def test_clip_skip_leaves_out_layers_and_keeps_the_final_norm(clip_params):
    tokens = jnp.arange(77)[None] % 50
    short = CLIPText(dataclasses.replace(NANO.clip, layers=NANO.clip.layers - 1))
    skipped = jax.jit(partial(CLIPText(NANO.clip).apply, skip=1))(clip_params, tokens)
    close(skipped, jax.jit(short.apply)(clip_params, tokens))
    np.testing.assert_allclose(np.asarray(skipped).std(-1).mean(), 1.0, atol=0.2)  # normed: scales are 1 +- 0.1


def test_text_tower_in_bfloat16(clip_params):
    tokens = jnp.arange(77)[None] % 50
    half = jax.jit(CLIPText(NANO.clip, jnp.bfloat16).apply)(clip_params, tokens)
    assert half.dtype == jnp.bfloat16
    close(half, jax.jit(CLIPText(NANO.clip).apply)(clip_params, tokens), 4e-2)  # 2^-8 over two layers


# ---- UNet ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unet_params():
    return {"params": params_like(UNet(SMALL), *unet_inputs())}


@pytest.fixture(scope="module")
def unet():
    return jax.jit(UNet(SMALL).apply)


def unet_inputs(lead=(4,)):
    t = jnp.linspace(3.25, 981.5, int(np.prod(lead))).reshape(lead)
    return jnp.asarray(noise("x", (*lead, 6, 8, 4))), t, jnp.asarray(noise("context", (*lead, 77, 16)))


def test_any_leading_batch_shape_is_a_flat_batch(unet, unet_params):
    x, t, context = unet_inputs((2, 2))
    flat = unet(unet_params, x.reshape(4, 6, 8, 4), t.reshape(4), context.reshape(4, 77, 16))
    out = unet(unet_params, x, t, context)
    assert out.shape == x.shape and out.dtype == jnp.float32
    close(out.reshape(flat.shape), flat)


def test_examples_of_a_batch_do_not_mix(unet, unet_params):
    """Another example, timestep or context in the last place leaves the first three alone, and changes the last."""
    x, t, context = unet_inputs()
    out = unet(unet_params, x, t, context)
    for changed in ((x.at[3].add(1), t, context), (x, t.at[3].add(0.5), context), (x, t, context.at[3].add(1))):
        other = unet(unet_params, *changed)
        np.testing.assert_array_equal(other[:3], out[:3])
        assert float(jnp.abs(other[3] - out[3]).max()) > 1e-4


def test_remat_changes_neither_values_nor_gradients():
    config = dataclasses.replace(SMALL, widths=(8,), attention=(False,), heads=(2,))
    args = unet_inputs((2,))
    params = {"params": params_like(UNet(config), *args)}

    def value_and_gradient(remat):
        def loss(p):
            return jnp.mean(UNet(config, remat=remat).apply(p, *args) ** 2)

        return jax.jit(jax.value_and_grad(loss))(params)

    (value, gradient), (value_remat, gradient_remat) = value_and_gradient(False), value_and_gradient(True)
    close(value_remat, value)
    jax.tree.map(partial(close, tolerance=1e-4), gradient_remat, gradient)  # small leaves are sums that cancel
    program = str(jax.make_jaxpr(UNet(config, remat=True).apply)(params, *args))
    assert program.count("prevent_cse") == 6  # five residual blocks and the middle's transformer


def test_unet_in_bfloat16(unet, unet_params):
    args = unet_inputs()
    half = jax.jit(UNet(SMALL, jnp.bfloat16).apply)(unet_params, *args)
    assert half.dtype == jnp.float32  # the samplers' precision, whatever the network computes in
    close(half, unet(unet_params, *args), 4e-2)  # 2^-8 over some 30 layers, growing as its root


def test_bfloat16_still_tells_neighbouring_timesteps_apart():
    """981 is 980 in bfloat16: the embedding must be made in float32, and only then rounded."""
    assert jnp.bfloat16(981) == jnp.bfloat16(980)
    module = TimeEmbedding(16, jnp.bfloat16)
    t = jnp.arange(970.0, 990.0)
    params = {"params": params_like(module, t)}
    out = module.apply(params, t)
    gaps = np.abs(np.diff(np.asarray(out, np.float32), axis=0)).max(-1)
    assert gaps.min() > 1e-2
    np.testing.assert_array_equal(out, TimeEmbedding(16, jnp.float32).apply(params, t).astype(jnp.bfloat16))


def test_sinusoids_are_cosines_then_sines():
    out = np.asarray(sinusoids(jnp.array([0.0, 1.0, 250.75]), 320), np.float64)
    t = np.array([0.0, 1.0, 250.75])[:, None] * np.exp(-np.log(1e4) * np.arange(160) / 160)
    np.testing.assert_allclose(out, np.concatenate([np.cos(t), np.sin(t)], -1), atol=4e-5)  # float32 of angles to 251


@pytest.mark.parametrize("size", [(6, 10), (5, 9), (5, 10)])
def test_upsample_meets_the_skip_of_an_odd_grid(size):
    x = jnp.asarray(noise("x", (1, 3, 5, 2)))
    module = Upsample(2, jnp.float32)
    kernel = jnp.zeros((3, 3, 2, 2)).at[1, 1].set(jnp.eye(2))  # the convolution that does nothing
    out = module.apply({"params": {"conv": {"kernel": kernel, "bias": jnp.zeros(2)}}}, x, size)
    rows, columns = (np.floor(np.arange(n) * m / n).astype(int) for n, m in zip(size, (3, 5), strict=True))
    np.testing.assert_array_equal(out, x[:, rows][:, :, columns])  # torch's nearest interpolation to ``size``


# ---- VAE -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae_params(nano_params):
    return {"params": nano_params["vae"]}


def test_posterior_is_that_of_scaled_latents(vae_params):
    image = jnp.asarray(noise("image", (2, 24, 16, 3)))
    scale = 0.5
    one, other = (VAE(dataclasses.replace(NANO.vae, scale=s)) for s in (1.0, scale))

    def encode(module):
        return jax.jit(partial(module.apply, method="encode"))(vae_params, image)

    plain, scaled = encode(one), encode(other)
    assert plain.mean.shape == (2, 3, 2, 4)
    close(scaled.mean, scale * plain.mean)
    close(scaled.std, scale * plain.std)
    close(scaled.kl, plain.kl)  # of the unscaled latents
    kl = 0.5 * (plain.mean**2 + plain.std**2 - 1 - 2 * jnp.log(plain.std))
    close(plain.kl, kl, 1e-4)  # log(std) loses what is near std = 1


def test_sample_is_mean_plus_std_times_noise():
    posterior = Posterior(jnp.full((1, 1, 1, 4), 2.0), jnp.full((1, 1, 1, 4), 0.5), jnp.zeros((1, 1, 1, 4)))
    np.testing.assert_allclose(posterior.sample(jnp.full((1, 1, 1, 4), -1.0)), 1.5)


@pytest.mark.parametrize("logvar, clamped", [(-100.0, -30.0), (50.0, 20.0)])
def test_log_variance_is_clamped(vae_params, logvar, clamped):
    p = dict(vae_params["params"])
    p["quant_conv"] = {"kernel": jnp.zeros((8, 8)), "bias": jnp.array([0.0] * 4 + [logvar] * 4)}
    posterior = jax.jit(partial(VAE(NANO.vae).apply, method="encode"))({"params": p}, jnp.zeros((1, 24, 16, 3)))
    np.testing.assert_allclose(posterior.std, NANO.vae.scale * np.exp(clamped / 2), rtol=1e-5)


def test_vae_in_bfloat16():
    config = dataclasses.replace(NANO.vae, widths=(8, 16), layers=1)
    image = jnp.asarray(noise("image", (1, 8, 8, 3)))
    params = {"params": params_like(VAE(config), image)}
    half, full = (jax.jit(VAE(config, dtype).apply)(params, image) for dtype in (jnp.bfloat16, jnp.float32))
    assert half.dtype == jnp.float32
    close(half, full, 6e-2)  # 2^-8 over some 40 layers, growing as its root
