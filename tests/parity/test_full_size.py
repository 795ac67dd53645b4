"""The three networks at the exact size of v1-4, with random weights, against torch: some minutes, 8 GiB, two cores.

Torch computes first and its module is dropped before ours runs: a UNet's weights are 3.4 GB, and two copies are
enough. ``pytest --no-full`` leaves these out.
"""

import gc

import jax
import numpy as np
import pytest

from sd_jax.config import SD_V1_4, from_diffusers
from sd_jax.models.clip import CLIPText
from sd_jax.models.unet import UNet
from sd_jax.models.vae import VAE
from tests.parity.reference import assert_close, build, nchw, nhwc, torch
from tests.random_weights import checkpoint, noise, our_params
from tests.test_config import V1_4

pytestmark = pytest.mark.full

# Of the reference's largest value: sums of up to 11520 float32 products, in another order.
TEXT, UNET, AUTOENCODER = 1e-5, 2e-5, 1e-5


def referee(component: str, parameters: int, run) -> tuple[list[np.ndarray], dict]:
    """``run(torch module)`` -> list of arrays; and our parameters of the same weights, on the device."""
    assert from_diffusers(**V1_4) == SD_V1_4
    tensors = checkpoint(component, SD_V1_4)
    module = build(component, V1_4[{"clip": "text_encoder"}.get(component, component)], tensors)
    assert sum(p.numel() for p in module.parameters()) == parameters
    with torch.inference_mode():
        expected = run(module)
    del module
    params = our_params(component, SD_V1_4, tensors)
    assert sum(a.size for a in jax.tree.leaves(params)) == parameters
    del tensors
    gc.collect()
    return expected, jax.device_put(params)


def compiled(module, **kwargs):
    """Compiled as users have it: the rest of the tests asks XLA for less."""
    options = {"xla_backend_optimization_level": 3} if jax.default_backend() == "cpu" else None
    return jax.jit(lambda params, *args: module.apply({"params": params}, *args, **kwargs), compiler_options=options)


def test_text_tower(highest):
    tokens = np.random.default_rng(0).integers(0, 49406, (2, 77), np.int32)
    tokens[:, 0], tokens[0, 9:], tokens[1, 76] = 49406, 49407, 49407
    (expected,), params = referee(
        "clip", 123_060_480, lambda clip: [clip(torch.from_numpy(tokens).long()).last_hidden_state.numpy()]
    )
    assert_close("text tower", compiled(CLIPText(SD_V1_4.clip))(params, tokens), expected, TEXT)


def test_unet(highest):
    def inputs(batch, size, t):
        return noise("x", (batch, *size, 4)), np.array(t, np.float32), noise("context", (batch, 77, 768))

    cases = {
        "512x512 pixels": inputs(1, (64, 64), [981.0]),  # self-attention is chunked
        "104x80 pixels": inputs(2, (13, 10), [0.5, 250.75]),  # a grid that halves to odd numbers
    }

    def run(unet):
        return [nhwc(unet(nchw(x), *map(torch.from_numpy, rest)).sample) for x, *rest in cases.values()]

    expected, params = referee("unet", 859_520_964, run)
    apply = compiled(UNet(SD_V1_4.unet))
    for (name, args), theirs in zip(cases.items(), expected, strict=True):
        assert_close(f"UNet {name}", apply(params, *args), theirs, UNET)


def test_vae(highest):
    """Neither side a multiple of 64 pixels; 1302 positions in the middle, so that attention is chunked."""
    latents, image = noise("latents", (1, 31, 42, 4)), noise("image", (1, 248, 336, 3))
    scale = SD_V1_4.vae.scale

    def run(vae):
        posterior = vae.encode(nchw(image)).latent_dist
        return [nhwc(posterior.mean), nhwc(posterior.std), nhwc(vae.decode(nchw(latents) / scale).sample)]

    (mean, std, decoded), params = referee("vae", 83_653_863, run)
    posterior = compiled(VAE(SD_V1_4.vae), method="encode")(params, image)
    assert_close("mean", posterior.mean, scale * mean, AUTOENCODER)
    assert_close("std", posterior.std, scale * std, AUTOENCODER)
    assert_close("decode", compiled(VAE(SD_V1_4.vae), method="decode")(params, latents), decoded, AUTOENCODER)
