"""The three networks whole against torch, at toy widths: odd sizes, batches, timesteps, channels, heads."""

import dataclasses

import numpy as np
import pytest

from sd_jax.config import NANO
from sd_jax.models.clip import CLIPText
from sd_jax.models.unet import UNet
from sd_jax.models.vae import VAE
from tests.parity.reference import assert_close, nchw, nhwc, pair, run, torch
from tests.random_weights import noise

# Of the reference's largest value, float32: sums in another order, through 2 layers, some 80, and some 40.
TEXT, UNET, AUTOENCODER = 1e-5, 2e-5, 1e-5


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_text_tower(activation):
    config = dataclasses.replace(NANO, clip=dataclasses.replace(NANO.clip, activation=activation))
    clip = pair("clip", config)
    tokens = np.random.default_rng(0).integers(0, NANO.clip.vocab_size, (3, 77), np.int32)
    tokens[1, 5:] = NANO.clip.vocab_size - 1  # padded with the end token, which is attended to
    expected = clip.torch(torch.from_numpy(tokens).long()).last_hidden_state.numpy()
    assert_close(activation, run(CLIPText(config.clip), clip.params, tokens), expected, TEXT)


def test_text_tower_skipping_its_last_layer():
    clip = pair("clip")
    tokens = np.random.default_rng(1).integers(0, NANO.clip.vocab_size, (1, 77), np.int32)
    states = clip.torch(torch.from_numpy(tokens).long(), output_hidden_states=True).hidden_states
    expected = clip.torch.final_layer_norm(states[-2]).numpy()
    assert_close("skip 1", run(CLIPText(NANO.clip), clip.params, tokens, skip=1), expected, TEXT)


def compare_unet(model, lead: tuple[int, ...], size: tuple[int, int], t) -> None:
    c = model.config.unet
    x, context = noise("x", (*lead, *size, c.in_channels)), noise("context", (*lead, 77, c.context_width))
    t = np.asarray(t, np.float32)
    ours = run(UNet(c), model.params, x, t, context)
    flat_t = torch.from_numpy(np.broadcast_to(t, lead).reshape(-1).copy())
    flat_context = torch.from_numpy(context.reshape(-1, *context.shape[-2:]))
    expected = model.torch(nchw(x.reshape(-1, *x.shape[-3:])), flat_t, flat_context).sample
    assert_close(f"UNet {lead} {size}", ours, nhwc(expected).reshape(*lead, *size, c.out_channels), UNET)


@pytest.fixture(scope="module")
def unet():
    return pair("unet")


@pytest.mark.parametrize(
    "lead, size, t",
    [
        ((3,), (5, 7), [0.0, 250.75, 999.0]),
        ((2, 2), (9, 12), [[981.0, 981.0], [1.5, 1.5]]),  # pairs, as under guidance
        ((2,), (13, 8), 501.0),  # one timestep for all
    ],
    ids=["5x7", "9x12", "13x8"],
)
def test_unet(unet, lead, size, t):
    compare_unet(unet, lead, size, t)


def test_unet_of_the_inpainting_model():
    unet = dataclasses.replace(
        NANO.unet, layers=1, in_channels=9, widths=(16, 32), attention=(True, False), heads=(2, 2)
    )
    compare_unet(pair("unet", dataclasses.replace(NANO, unet=unet)), (1,), (6, 4), 300.0)


def test_unet_with_heads_of_its_own_at_each_level():
    """The shape of the embedded model: two levels, a transformer at each, heads of one width."""
    unet = dataclasses.replace(NANO.unet, layers=1, widths=(32, 64), attention=(True, True), heads=(1, 2))
    compare_unet(pair("unet", dataclasses.replace(NANO, unet=unet)), (2,), (5, 8), [12.25, 700.0])


@pytest.fixture(scope="module")
def vae():
    return pair("vae")


@pytest.mark.parametrize("batch, size", [(2, (40, 56)), (1, (72, 64))])
def test_vae_encode(vae, batch, size):
    image = noise("image", (batch, *size, 3))
    expected = vae.torch.encode(nchw(image)).latent_dist
    ours = run(VAE(NANO.vae), vae.params, image, method="encode")
    assert_close(f"mean {size}", ours.mean, NANO.vae.scale * nhwc(expected.mean), AUTOENCODER)
    assert_close(f"std {size}", ours.std, NANO.vae.scale * nhwc(expected.std), AUTOENCODER)
    kl = np.asarray(ours.kl).sum((1, 2, 3))
    assert_close(f"kl {size}", kl, expected.kl().numpy(), AUTOENCODER)


@pytest.mark.parametrize("batch, size", [(2, (5, 7)), (1, (9, 8))])
def test_vae_decode(vae, batch, size):
    latents = noise("latents", (batch, *size, 4))
    expected = vae.torch.decode(nchw(latents) / NANO.vae.scale).sample
    ours = run(VAE(NANO.vae), vae.params, latents, method="decode")
    assert_close(f"decode {size}", ours, nhwc(expected), AUTOENCODER)
