"""Layer by layer against torch, at NANO size: when a whole model is off, these say where."""

import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.config import NANO
from sd_jax.models.attention import Attention
from sd_jax.models.clip import CLIPLayer
from sd_jax.models.layers import PAD_ALL, PAD_END, Downsample, ResBlock, Upsample
from sd_jax.models.unet import GEGLU, TimeEmbedding, Transformer
from sd_jax.models.vae import SpatialAttention
from tests.parity.reference import assert_close, nchw, nhwc, pair, run, torch
from tests.random_weights import noise

F32 = jnp.float32
UNET, VAE, CLIP = NANO.unet, NANO.vae, NANO.clip
TOLERANCE = 3e-6  # a layer is a few float32 sums of up to 1300 products; measured: at most 6e-7


@pytest.fixture(scope="module")
def unet():
    return pair("unet")


@pytest.fixture(scope="module")
def vae():
    return pair("vae")


@pytest.fixture(scope="module")
def clip():
    return pair("clip")


@pytest.mark.parametrize(
    "path, theirs, channels, features",
    [
        ("down_0_res_0", "down_blocks.0.resnets.0", 16, 16),  # no skip projection
        ("down_1_res_0", "down_blocks.1.resnets.0", 16, 32),
        ("mid_res_1", "mid_block.resnets.1", 48, 48),
        ("up_1_res_2", "up_blocks.2.resnets.2", 48, 32),
    ],
)
def test_unet_res_block(unet, path, theirs, channels, features):
    x, temb = noise("x", (2, 5, 6, channels)), noise("temb", (2, 4 * UNET.widths[0]))
    expected = unet.torch.get_submodule(theirs)(nchw(x), torch.from_numpy(temb))
    ours = run(ResBlock(features, UNET.groups, UNET.eps, F32), unet.inner(path), x, temb)
    assert_close(path, ours, nhwc(expected), TOLERANCE)


@pytest.mark.parametrize(
    "path, theirs, channels, features",
    [
        ("encoder/down_0_res_0", "encoder.down_blocks.0.resnets.0", 8, 8),
        ("encoder/down_1_res_0", "encoder.down_blocks.1.resnets.0", 8, 16),
        ("decoder/mid_res_0", "decoder.mid_block.resnets.0", 24, 24),
        ("decoder/up_0_res_0", "decoder.up_blocks.3.resnets.0", 16, 8),
    ],
)
def test_vae_res_block(vae, path, theirs, channels, features):
    x = noise("x", (2, 5, 6, channels))
    expected = vae.torch.get_submodule(theirs)(nchw(x), None)
    ours = run(ResBlock(features, VAE.groups, VAE.eps, F32), vae.inner(path), x)
    assert_close(path, ours, nhwc(expected), TOLERANCE)


def test_group_norm_epsilon_where_the_input_is_almost_constant(unet, vae):
    """Variances of the order of epsilon tell 1e-5 from 1e-6, and E[(x - mean)^2] from E[x^2] - mean^2."""
    x, temb = 5 + 3e-3 * noise("x", (1, 5, 6, 16)), noise("temb", (1, 4 * UNET.widths[0]))
    expected = unet.torch.get_submodule("down_blocks.0.resnets.0")(nchw(x), torch.from_numpy(temb))
    ours = run(ResBlock(16, UNET.groups, UNET.eps, F32), unet.inner("down_0_res_0"), x, temb)
    # x carries 7 digits and varies by 3e-3 / 5 of itself, so float32 leaves some 2e-4; the wrong epsilon is 0.3 off.
    assert_close("unet norm", ours - x, nhwc(expected) - x, 2e-3)
    context = noise("context", (1, 77, UNET.context_width))
    expected = unet.torch.get_submodule("down_blocks.0.attentions.0")(nchw(x), torch.from_numpy(context)).sample
    module = Transformer(UNET.heads[0], UNET.groups, "down", 0, (1,), F32)
    ours = run(module, unet.inner("down_0_attn_0"), x, context, None, None)
    assert_close("transformer norm", ours - x, nhwc(expected) - x, 2e-3)
    x = x[..., :8]
    expected = vae.torch.get_submodule("encoder.down_blocks.0.resnets.0")(nchw(x), None)
    ours = run(ResBlock(8, VAE.groups, VAE.eps, F32), vae.inner("encoder/down_0_res_0"), x)
    assert_close("vae norm", ours - x, nhwc(expected) - x, 2e-3)


@pytest.mark.parametrize(
    "path, theirs, level",
    [("down_0_attn_1", "down_blocks.0.attentions.1", 0), ("mid_attn_0", "mid_block.attentions.0", 3)],
)
def test_transformer(unet, path, theirs, level):
    features = UNET.widths[level]
    x, context = noise("x", (2, 5, 6, features)), noise("context", (2, 77, UNET.context_width))
    expected = unet.torch.get_submodule(theirs)(nchw(x), torch.from_numpy(context), return_dict=False)[0]
    module = Transformer(UNET.heads[level], UNET.groups, "down", level, (2,), F32)
    assert_close(path, run(module, unet.inner(path), x, context, None, None), nhwc(expected), TOLERANCE)


@pytest.mark.parametrize("name, theirs", [("self_attn", "attn1"), ("cross_attn", "attn2")])
def test_unet_attention(unet, name, theirs):
    x, context = noise("x", (2, 30, 32)), None if name == "self_attn" else noise("context", (2, 77, UNET.context_width))
    block = unet.torch.get_submodule(f"down_blocks.1.attentions.0.transformer_blocks.0.{theirs}")
    expected = block(torch.from_numpy(x), None if context is None else torch.from_numpy(context))
    ours = run(Attention(UNET.heads[1], F32), unet.inner(f"down_1_attn_0/{name}"), x, context)
    assert_close(name, ours, expected.numpy(), TOLERANCE)


def test_geglu_has_the_exact_gelu(unet):
    x = 2 * noise("x", (2, 30, 16))
    expected = unet.torch.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.ff")(torch.from_numpy(x))
    assert_close("GEGLU", run(GEGLU(F32), unet.inner("down_0_attn_0/ff"), x), expected.numpy(), TOLERANCE)


@pytest.mark.parametrize("size", [(6, 8), (5, 8), (6, 7), (5, 7)])
def test_unet_upsample(unet, size):
    x = noise("x", (2, 3, 4, 32))
    expected = unet.torch.get_submodule("up_blocks.2.upsamplers.0")(nchw(x), size)
    ours = run(Upsample(32, F32), unet.inner("up_1_upsample"), x, size=size)
    assert_close(f"upsample to {size}", ours, nhwc(expected), TOLERANCE)


def test_vae_upsample(vae):
    x = noise("x", (2, 3, 4, 16))
    expected = vae.torch.get_submodule("decoder.up_blocks.2.upsamplers.0")(nchw(x))
    ours = run(Upsample(16, F32), vae.inner("decoder/up_1_upsample"), x, size=(6, 8))
    assert_close("upsample", ours, nhwc(expected), TOLERANCE)


@pytest.mark.parametrize("size", [(6, 8), (5, 8), (5, 7)])
def test_downsample_pads_all_sides_in_the_unet_and_the_end_in_the_vae(unet, vae, size):
    x = noise("x", (2, *size, 16))
    expected = unet.torch.get_submodule("down_blocks.0.downsamplers.0")(nchw(x))
    ours = run(Downsample(16, PAD_ALL, F32), unet.inner("down_0_downsample"), x)
    assert_close("unet downsample", ours, nhwc(expected), TOLERANCE)
    expected = vae.torch.get_submodule("encoder.down_blocks.1.downsamplers.0")(nchw(x))
    ours = run(Downsample(16, PAD_END, F32), vae.inner("encoder/down_1_downsample"), x)
    assert_close("vae downsample", ours, nhwc(expected), TOLERANCE)


def test_time_embedding(unet):
    t = np.array([0.0, 1.0, 0.029, 250.75, 980.0, 981.0, 999.0], np.float32)
    sinusoids = unet.torch.time_proj(torch.from_numpy(t))
    expected = unet.torch.time_embedding(sinusoids)
    ours = run(TimeEmbedding(UNET.widths[0], F32), unet.inner("time_embedding"), t)
    assert_close("time embedding", ours, expected.numpy(), 2e-5)  # angles of 999 hold four decimals in float32


def test_clip_layer(clip):
    x = noise("x", (2, 11, CLIP.width))
    mask = np.tril(np.ones((11, 11), bool))
    additive = torch.where(torch.from_numpy(mask), 0.0, float("-inf"))[None, None]
    for i in range(CLIP.layers):
        expected = clip.torch.get_submodule(f"encoder.layers.{i}")(torch.from_numpy(x), additive)
        ours = run(CLIPLayer(CLIP, F32), clip.inner(f"layer_{i}"), x, jnp.asarray(mask))
        assert_close(f"layer {i}", ours, expected.numpy(), TOLERANCE)


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_vae_attention(vae, half):
    x = noise("x", (2, 5, 6, 24))
    expected = vae.torch.get_submodule(f"{half}.mid_block.attentions.0")(nchw(x))
    ours = run(SpatialAttention(VAE.groups, VAE.eps, F32), vae.inner(f"{half}/mid_attn"), x)
    assert_close(f"{half} attention", ours, nhwc(expected), TOLERANCE)
