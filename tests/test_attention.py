"""Attention: four ways to one function, which one each layer of v1-4 takes, and edits of the probabilities."""

import dataclasses
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.config import SD_V1_4, UNetConfig
from sd_jax.models.attention import Attention, attend, choose, mix, probabilities
from sd_jax.models.unet import UNet
from sd_jax.types import Site, Step
from tests.random_weights import noise, params_like

# ---- attend ----------------------------------------------------------------------------------------------------------


def qkv(queries, keys, heads=2, width=8, dtype=jnp.float32):
    shapes = {"q": (2, queries, heads, width), "k": (2, keys, heads, width), "v": (2, keys, heads, width)}
    return tuple(jnp.asarray(noise(name, shape), dtype) for name, shape in shapes.items())


def float64(q, k, v, mask=None):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    scores = np.einsum("nqhd,nkhd->nhqk", q, k) / np.sqrt(q.shape[-1])
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("nhqk,nkhd->nqhd", weights / weights.sum(-1, keepdims=True), v)


# Sums of up to 1300 float32 products; bfloat16 rounds probabilities and the output at 2^-8 of about 1.
TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("lengths", [(1300, 77), (513, 1025), (512, 512), (5, 7)])
@pytest.mark.parametrize("how", ["explicit", "chunked", "xla"])
def test_every_way_is_softmax_attention(how, lengths, dtype):
    q, k, v = qkv(*lengths, dtype=dtype)
    out = attend(q, k, v, how=how)
    assert out.dtype == dtype and out.shape == q.shape
    np.testing.assert_allclose(np.asarray(out, np.float64), float64(q, k, v), atol=TOLERANCE[dtype])


@pytest.mark.parametrize("how", ["chunked", "xla"])
def test_gradients_are_those_of_the_explicit_way(how):
    arrays = qkv(700, 77)  # 700 is padded to two chunks: padding must not leak into the gradients
    cotangent = noise("cotangent", arrays[0].shape)

    def gradients(how):
        return jax.jit(jax.grad(lambda args: jnp.sum(attend(*args, how=how) * cotangent)))(arrays)

    for ours, explicit in zip(gradients(how), gradients("explicit"), strict=True):
        scale = float(jnp.abs(explicit).max())
        np.testing.assert_allclose(ours, explicit, atol=3e-6 * scale)  # reordered float32 sums of 700 terms


def test_chunked_never_holds_all_scores_even_under_grad():
    q, k, v = qkv(2048, 2048)
    program = jax.make_jaxpr(jax.grad(lambda q: attend(q, k, v, how="chunked").sum()))(q)
    explicit = jax.make_jaxpr(jax.grad(lambda q: attend(q, k, v, how="explicit").sum()))(q)
    assert "2048,2048]" in str(explicit)
    assert "512,2048]" in str(program) and "2048,2048]" not in str(program)


def test_mask_keeps_where_it_is_true():
    q, k, v = qkv(6, 6)
    mask = np.tril(np.ones((6, 6), bool))
    out = attend(q, k, v, mask=jnp.asarray(mask))
    np.testing.assert_allclose(out, float64(q, k, v, mask), atol=TOLERANCE[jnp.float32])
    assert float(jnp.abs(probabilities(q, k, jnp.asarray(mask)) * ~mask).max()) == 0.0


def test_softmax_is_float32_in_bfloat16():
    q, k, v = qkv(4, 4, dtype=jnp.bfloat16)
    probs = probabilities(q, k)
    assert probs.dtype == jnp.float32 and mix(probs, v).dtype == jnp.bfloat16
    np.testing.assert_allclose(probs.sum(-1), 1.0, atol=1e-6)  # bfloat16 sums would miss by 1e-3


# ---- choose ----------------------------------------------------------------------------------------------------------

HALF = (jnp.bfloat16, jnp.float16)
AMPERE, HOPPER = 8.0, 9.0
# (queries, keys, head_dim) of every kind of site at 512x512: expected on cpu; gpu float32, Ampere half; tpu, any dtype.
SITES = {
    "level 0 self": ((4096, 4096, 40), ("chunked", "xla", "cudnn", "xla")),
    "level 0 cross": ((4096, 77, 40), ("explicit", "xla", "cudnn", "xla")),
    "level 1 self": ((1024, 1024, 80), ("chunked", "xla", "cudnn", "xla")),
    "level 1 cross": ((1024, 77, 80), ("explicit", "xla", "cudnn", "xla")),
    "level 2 self": ((256, 256, 160), ("explicit", "xla", "xla", "xla")),  # cuDNN takes 160 on Hopper only
    "level 2 cross": ((256, 77, 160), ("explicit", "xla", "xla", "xla")),
    "middle self": ((64, 64, 160), ("explicit", "xla", "xla", "xla")),
    "middle cross": ((64, 77, 160), ("explicit", "xla", "xla", "xla")),
    "VAE": ((4096, 4096, 512), ("chunked", "chunked", "chunked", "chunked")),  # no flash kernel is that wide
}


@pytest.mark.parametrize("site", SITES)
def test_choice_for_every_site_of_v1_4(site):
    (queries, keys, head_dim), (cpu, gpu, gpu_half, tpu) = SITES[site]
    go = partial(choose, queries=queries, keys=keys, head_dim=head_dim, edited=False, masked=False)
    for dtype in (jnp.float32, *HALF):
        assert go(backend="cpu", dtype=dtype) == cpu
        assert go(backend="gpu", dtype=dtype, capability=AMPERE) == (gpu_half if dtype in HALF else gpu)
        assert go(backend="gpu", dtype=dtype) == go(backend="gpu", dtype=dtype, capability=7.5) == gpu  # ROCm; Turing
        if head_dim <= 160 and dtype in HALF:
            assert go(backend="gpu", dtype=dtype, capability=HOPPER) == "cudnn"
        assert go(backend="tpu", dtype=dtype) == tpu


@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
def test_edited_and_masked_layers_show_their_probabilities(backend):
    go = partial(choose, backend=backend, dtype=jnp.bfloat16, head_dim=40, queries=4096, keys=4096, capability=HOPPER)
    assert go(edited=True, masked=False) == go(edited=False, masked=True) == "explicit"


@pytest.mark.gpu
@pytest.mark.parametrize("site", SITES)
def test_what_a_gpu_chooses_is_softmax_attention_there(site):
    """Forward and backward in bfloat16, by whichever way the device at hand is given."""
    (queries, keys, head_dim), _ = SITES[site]
    with jax.default_device(jax.devices("gpu")[0]):
        q, k, v = qkv(queries, keys, width=head_dim, dtype=jnp.bfloat16)
        cotangent = jnp.asarray(noise("cotangent", q.shape), jnp.bfloat16)
        out, back = jax.vjp(attend, q, k, v)
        expected, back_explicit = jax.vjp(partial(attend, how="explicit"), q, k, v)
        pairs = [(out, expected), *zip(back(cotangent), back_explicit(cotangent), strict=True)]
    for ours, explicit in pairs:
        scale = float(jnp.abs(explicit).max())
        np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(explicit, np.float32), atol=3e-2 * scale)


# ---- edits -----------------------------------------------------------------------------------------------------------

# Two levels, a transformer at each: (level 0: one head, level 1: two), small enough to compile in a few seconds.
CONFIG = UNetConfig(
    widths=(16, 32), layers=1, attention=(True, True), heads=(1, 2), context_width=16, groups=4, sample_size=8
)
B, H, W = 2, 8, 6


@pytest.fixture(scope="module")
def params():
    return params_like(UNet(CONFIG), *inputs())


def inputs(height=H, width=W):
    """A batch of guidance pairs: x [B,2,h,w,4], t [B,2], context [B,2,77,D]."""
    x = noise("x", (B, 2, height, width, 4))
    return jnp.asarray(x), jnp.full((B, 2), 500.0), jnp.asarray(noise("context", (B, 2, 77, 16)))


def step_at(i: int) -> Step:
    zero = jnp.float32(0)
    return Step(jnp.int32(i), zero, zero, zero, zero, zero, zero)


@flax.struct.dataclass
class Look:
    """Changes nothing, at the cross-attention of one place."""

    place: str = flax.struct.field(pytree_node=False, default="up")

    def where(self, site):
        return site.cross and site.place == self.place

    def __call__(self, probs, site, s):
        return probs


@flax.struct.dataclass
class Blind:
    """Before step ``until``, cross-attention sees the first token only."""

    until: int

    def where(self, site):
        return site.cross

    def __call__(self, probs, site, s):
        return jnp.where(s.i < self.until, jnp.zeros_like(probs).at[..., 0].set(1.0), probs)


@pytest.fixture(scope="module")
def apply():
    return jax.jit(lambda params, edit, step: UNet(CONFIG).apply({"params": params}, *inputs(), edit, step))


@pytest.fixture(scope="module")
def plain(apply, params):
    return apply(params, None, None)


def test_an_edit_that_returns_what_it_got_changes_nothing(params, plain):
    run = jax.jit(partial(UNet(CONFIG).apply, mutable=["intermediates"]))
    out, state = run({"params": params}, *inputs(), Look(), step_at(0))
    np.testing.assert_allclose(out, plain, atol=1e-5 * float(jnp.abs(plain).max()))  # float32, reordered at most

    sown = jax.tree_util.tree_flatten_with_path(state["intermediates"])[0]
    found = {"/".join(str(getattr(p, "key", p)) for p in path[:-2]): leaf.shape for path, leaf in sown}
    # Only the edited layers report, on axes (image, guidance pair, head, query, key).
    assert found == {
        "up_1_attn_0/cross_attn": (B, 2, 2, H // 2 * W // 2, 77),
        "up_1_attn_1/cross_attn": (B, 2, 2, H // 2 * W // 2, 77),
        "up_0_attn_0/cross_attn": (B, 2, 1, H * W, 77),
        "up_0_attn_1/cross_attn": (B, 2, 1, H * W, 77),
    }
    for _, probs in sown:
        np.testing.assert_allclose(probs.sum(-1), 1.0, atol=1e-6)


def test_edits_see_the_step_and_their_numbers_do_not_recompile(apply, params, plain):
    before = apply._cache_size()
    early, late = apply(params, Blind(until=3), step_at(2)), apply(params, Blind(until=3), step_at(3))
    np.testing.assert_allclose(late, plain, atol=1e-5 * float(jnp.abs(plain).max()))
    assert float(jnp.abs(early - plain).max()) > 1e-2
    np.testing.assert_array_equal(apply(params, Blind(until=1), step_at(2)), late)
    assert apply._cache_size() == before + 1


def test_gradients_flow_through_an_edit():
    @flax.struct.dataclass
    class Scale:
        by: jax.Array

        def where(self, site):
            return True

        def __call__(self, probs, site, s):
            return probs * self.by

    site = Site("attn", False, "mid", 0, 2, 4, 1)
    module, x = Attention(2, jnp.float32), jnp.asarray(noise("x", (2, 4, 8)))
    weights = params_like(module, x)

    def value(by):
        return module.apply({"params": weights}, x, site=site, edit=Scale(by), lead=(2,)).sum()

    # The output is affine in the scale of the probabilities.
    np.testing.assert_allclose(jax.grad(value)(jnp.float32(0.3)), value(1.0) - value(0.0), rtol=1e-4)


def test_layers_nobody_edits_keep_their_kernel(params, monkeypatch):
    """On a 32x32 grid self-attention has 1024 x 1024 scores, which the CPU's chunked way never holds at once."""
    if jax.default_backend() != "cpu":
        pytest.skip("the choice asserted here is the CPU's")

    @flax.struct.dataclass
    class SelfAttention:
        def where(self, site):
            return not site.cross

        def __call__(self, probs, site, s):
            return probs

    def program(edit):
        return str(jax.make_jaxpr(UNet(CONFIG).apply)({"params": params}, *inputs(32, 32), edit, step_at(0)))

    assert "1024,1024]" not in program(None)
    assert "1024,1024]" not in program(Look())  # a cross-attention edit leaves self-attention alone
    assert "1024,1024]" in program(SelfAttention())


def test_sites_of_v1_4():
    """``where`` is asked once for each attention layer, and ``Site.name`` is the layer's path in the parameters."""
    sites = []

    class Survey:
        def where(self, site):
            sites.append(site)
            return False

    args = (jnp.zeros((1, 64, 64, 4)), jnp.zeros(1), jnp.zeros((1, 77, 768)))
    module = UNet(SD_V1_4.unet)
    params = jax.eval_shape(lambda key: module.init(key, *args, Survey()), jax.random.key(0))["params"]

    assert len(sites) == len({s.name for s in sites}) == 32
    for site in sites:
        transformer, layer = site.name.split("/")
        query, key = params[transformer][layer]["q"]["kernel"], params[transformer][layer]["k"]["kernel"]
        width = SD_V1_4.unet.widths[site.level]
        assert query.shape == (width, width) and key.shape == ((768 if site.cross else width), width)
        grid = 64 // 2**site.level
        assert (site.heads, site.height, site.width) == (8, grid, grid)
        assert site.place == transformer.split("_")[0]
    assert {s.level for s in sites if s.place == "mid"} == {3}
    down = [dataclasses.replace(s, name="", place="") for s in sites if s.place == "down"]
    assert len(down) == 12 and [s.level for s in down] == [0] * 4 + [1] * 4 + [2] * 4
