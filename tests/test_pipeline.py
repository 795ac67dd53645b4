"""Whole pictures of a very small model: what decides them, what is compiled when, and the pure functions beneath."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sd_jax
from sd_jax import images as im
from sd_jax import pipeline as pl
from sd_jax.diffusion import draws
from sd_jax.diffusion.singlestep import DDIM
from sd_jax.pipeline import RUN, SD, NotFinite, Pipeline, make_plan
from sd_jax.types import RequestError
from sd_jax.weights.convert import write_diffusers, write_native
from tests.micro import MICRO, SIZE, TOKENIZER, params, picture, pipeline

STEPS = 3
PROMPTS = ["a red cube", "a blue sphere"]
INPAINTING = dataclasses.replace(MICRO, unet=dataclasses.replace(MICRO.unet, in_channels=9))
MASK = np.zeros((SIZE, SIZE), bool)
MASK[:, SIZE // 2 :] = True


@functools.cache
def make(prompts=tuple(PROMPTS), **options) -> np.ndarray:
    """Pictures of two prompts in few steps; the same request is run once."""
    return pipeline().text_to_image(list(prompts), steps=STEPS, **options)


def apart(a, b) -> int:
    """Largest difference of pixels, in levels."""
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


# ---- what decides a picture ------------------------------------------------------------------------------------------


def test_pictures_of_prompts():
    images = make()
    assert images.shape == (2, SIZE, SIZE, 3) and images.dtype == np.uint8 and images.std() > 10
    np.testing.assert_array_equal(pipeline().text_to_image(PROMPTS, steps=STEPS), images)


def test_a_picture_depends_on_its_own_seed_not_on_its_batch():
    alone = pipeline().text_to_image(PROMPTS[1], seed=1, steps=STEPS)
    # Another batch size is another program, whose sums may be in another order: half a level can round either way.
    assert alone.shape == (1, SIZE, SIZE, 3) and apart(alone[0], make()[1]) <= 1
    np.testing.assert_array_equal(make((PROMPTS[1], PROMPTS[0]), seeds=(1, 0)), make()[::-1])


def test_one_prompt_for_several_seeds_and_their_order():
    same = make((PROMPTS[0],) * 2)
    np.testing.assert_array_equal(pipeline().text_to_image(PROMPTS[0], seeds=range(2), steps=STEPS), same)
    np.testing.assert_array_equal(pipeline().text_to_image(PROMPTS[0], seeds=np.array([1, 0]), steps=STEPS), same[::-1])
    assert apart(same[0], same[1]) > 10


@pytest.mark.parametrize("dtype, levels", [("bfloat16", 26), ("float16", 4)])
def test_pictures_in_half_precision(dtype, levels):
    """The same picture: twice as far apart at most as it was seen to be."""
    half = Pipeline(SD(MICRO, dtype), params(), TOKENIZER).text_to_image(PROMPTS, steps=STEPS)
    assert 0 < apart(half, make()) <= levels


def test_every_option_counts():
    for options in ({"seed": 2**40}, {"guidance": 3.0}, {"negative": "a green cone"}, {"eta": 1.0}):
        assert apart(make(**options), make()) > 1, options
    assert apart(make(("a red cube", "a gray cone")), make()) > 1


def test_options_for_each_picture():
    mixed = make(guidance=(7.5, 3.0), negative=("", "a green cone"))
    np.testing.assert_array_equal(mixed[0], make()[0])
    np.testing.assert_array_equal(mixed[1], make(guidance=3.0, negative="a green cone")[1])


def test_what_is_not_asked_for_is_the_checkpoints_own():
    noise = dataclasses.replace(MICRO.noise, sampler="euler", guidance=3.0)
    asked = pl.Options(seed=3).resolved(noise)
    assert (asked.sampler, asked.guidance, asked.seed) == ("euler", 3.0, 3)
    assert pl.Options(sampler="ddim", guidance=1.0).resolved(noise) == pl.Options(sampler="ddim", guidance=1.0)
    other = dataclasses.replace(pipeline(), sd=SD(dataclasses.replace(MICRO, noise=noise)))
    expected = make(guidance=3.0, sampler="euler")
    np.testing.assert_array_equal(other.text_to_image(PROMPTS, steps=STEPS), expected)


def test_guidance_one_skips_the_unconditional_pass():
    skipped, full = make(guidance=1.0), make(guidance=(1.0, 7.5))
    assert apart(skipped[0], full[0]) <= 1 and apart(skipped[1], full[1]) > 1
    np.testing.assert_array_equal(make(guidance=1.0, negative="a green cone"), skipped)


def test_latents_stand_in_for_the_noise_of_seeds():
    noise = pl.starting_latents(SD(MICRO), draws.seed_words([0, 1]), (SIZE, SIZE))
    images = pipeline().text_to_image(PROMPTS, steps=STEPS, latents=noise, seed=7)
    assert apart(images, make()) <= 1
    with pytest.raises(RequestError, match=r"latents are \[1, 8, 8, 4\]; give \[2, height/2, width/2, 4\]"):
        pipeline().text_to_image(PROMPTS, latents=noise[:1])
    with pytest.raises(RequestError, match=r"latents are \[2, 8, 8, 4\]; give \[2, 4, 8, 4\]"):
        pipeline().image_to_image(PROMPTS, picture("a", 8, 16), latents=noise)
    with pytest.raises(RequestError, match="latents are those of a 16x16 picture; leave height and width out"):
        pipeline().text_to_image(PROMPTS, latents=noise, height=8)


def test_long_prompts_in_chunks():
    long = "red " * 40 + "cube"
    images = make((long, "a red cube"), long_prompt="chunk")
    with pytest.warns(UserWarning, match="^prompt 0 has .* tokens and 75 fit; these words were dropped: '.*cube'"):
        cut = make((long, "a red cube"))
    assert apart(images[0], cut[0]) > 0
    with pytest.warns(UserWarning, match="^negative prompt 0 has"):
        make(negative=long)


# ---- compiling and reporting -----------------------------------------------------------------------------------------


def test_nothing_people_sweep_compiles_anew():
    make()
    before = RUN["text_to_image"]._cache_size()
    make(("a cone", "two cones"), negative="a sphere", seeds=(5, 2**62), guidance=(2.0, 9.5), eta=0.5)
    assert RUN["text_to_image"]._cache_size() == before > 0


def test_progress_tells_of_each_evaluation():
    told = []
    options = dict(steps=STEPS, sampler="plms", progress=lambda *numbers: told.append(numbers))
    pipeline().text_to_image("", **options)
    assert sorted(told) == [(i + 1, STEPS + 1) for i in range(STEPS + 1)]  # PLMS asks once more than it steps
    before, again = RUN["text_to_image"]._cache_size(), []
    pipeline().text_to_image("", **options | {"progress": lambda *numbers: again.append(numbers)})
    assert sorted(again) == sorted(told) and len(told) == STEPS + 1
    assert RUN["text_to_image"]._cache_size() == before


def test_nan_is_found_in_the_picture_that_has_it():
    noise = np.array(pl.starting_latents(SD(MICRO), draws.seed_words([0, 1]), (SIZE, SIZE)))
    noise[1, 0, 0, 0] = np.nan
    with pytest.raises(NotFinite, match=r"1 of 2 images .* \(seeds 1\); try float32") as caught:
        pipeline().text_to_image(PROMPTS, steps=STEPS, latents=noise)
    assert caught.value.bad == [1] and apart(caught.value.images[0], make()[0]) <= 1


# ---- pictures from pictures ------------------------------------------------------------------------------------------


def round_trip(images: np.ndarray) -> tuple[jax.Array, np.ndarray]:
    """-> (latents as seeds 0, 1, ... draw them from the posterior, their pictures)."""
    encode = jax.jit(pl.encode_image, static_argnums=0)
    x0 = encode(SD(MICRO), params(), im.from_uint8(images), draws.seed_words(range(len(images))))
    return x0, im.to_uint8(np.asarray(pipeline().decode(x0)))


def test_image_to_image_keeps_what_little_noise_leaves():
    start = np.stack([picture("a"), picture("b")])
    _, kept = round_trip(start)
    weak = pipeline().image_to_image(PROMPTS, start, steps=10, strength=0.1)  # the last step of ten
    strong = pipeline().image_to_image(PROMPTS, start, steps=1, strength=1.0, spacing="trailing")  # from the top
    assert weak.shape == start.shape
    assert np.abs(weak.astype(int) - kept).mean() < np.abs(strong.astype(int) - kept).mean() / 2


def test_image_to_image_runs_the_end_of_the_grid():
    whole, part = (make_plan(MICRO.noise, 10, strength=s) for s in (1.0, 0.35))
    for name in ("i", "t", "alpha", "sigma_next"):
        np.testing.assert_array_equal(getattr(part.steps, name), getattr(whole.steps, name)[7:])


def test_inpainting_keeps_the_latents_outside_the_mask():
    start = picture("a")
    painted = pipeline().inpaint("a red cube", start, MASK, steps=STEPS)
    before = RUN["inpaint"]._cache_size()
    x0, kept = round_trip(start[None])
    untouched = pipeline().inpaint("a red cube", start, np.uint8(MASK & False), steps=STEPS)
    assert apart(untouched, kept) <= 1 and apart(painted, kept) > 10
    other = pipeline().inpaint("a blue cone", picture("b"), ~MASK, steps=STEPS, guidance=3.0)
    assert other.shape == painted.shape and RUN["inpaint"]._cache_size() == before


def test_inpainting_with_the_nine_channel_model():
    """It is shown the picture outside the mask, and nothing of the picture under it."""
    pipe, start = pipeline(INPAINTING), picture("a")
    painted = pipe.inpaint("a red cube", start, MASK, steps=STEPS)
    under, outside = start.copy(), start.copy()
    under[:, SIZE // 2 :] = 200
    outside[:, : SIZE // 2] = 200
    np.testing.assert_array_equal(pipe.inpaint("a red cube", under, MASK, steps=STEPS), painted)
    assert apart(pipe.inpaint("a red cube", outside, MASK, steps=STEPS), painted) > 1


@pytest.mark.parametrize(
    "images, masks, message",
    [
        (picture("a"), MASK[:8], "masks are 8x16 and images 16x16"),
        (picture("a")[:15], MASK, "image height 15 is not a multiple of 2; use 14 or 16"),
        (picture("a").astype(float), MASK, r"images are float64 \[1, 16, 16, 3\]; give uint8"),
        (picture("a"), MASK.astype(float), r"masks are float64 \[1, 16, 16\]; give uint8 or bool"),
        (np.stack([picture("a")] * 3), MASK, "there are 2 prompts and 3 pictures to make; give one, or one for each"),
    ],
)
def test_pictures_that_do_not_fit(images, masks, message):
    with pytest.raises(RequestError, match=message):
        pipeline().inpaint(PROMPTS, images, masks)


@pytest.mark.parametrize("method", ["text_to_image", "image_to_image"])
def test_the_inpainting_model_only_inpaints(method):
    pictures = [picture("a")] if method == "image_to_image" else []
    with pytest.raises(RequestError, match="inpainting model, whose UNet has 9 input channels; use inpaint, or load"):
        getattr(pipeline(INPAINTING), method)("a cone", *pictures)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sampler": DDIM(), "eta": 0.5}, "eta 0.5 is for the name 'ddim', and the sampler given is DDIM"),
        ({"sampler": DDIM}, "is no sampler; give a name, or an object with init and step"),
        ({"sampler": 3}, "sampler 3 is no sampler"),
    ],
)
def test_samplers_that_are_none(options, message):
    with pytest.raises(RequestError, match=message):
        pipeline().text_to_image("a cone", **options)


def test_a_step_is_slow_where_the_model_is_large():
    wide = jax.ShapeDtypeStruct((20_000, 10_000), np.float32)
    assert Pipeline(SD(MICRO), {"unet": {"kernel": wide}}, None).is_slow
    assert not pipeline().is_slow


# ---- the parts -------------------------------------------------------------------------------------------------------


def test_the_parts_of_the_pipeline():
    pipe = pipeline()
    context = pipe.encode_prompt(PROMPTS)
    assert context.shape == (2, 77, MICRO.clip.width)
    assert pipe.encode_prompt("red " * 40, long_prompt="chunk").shape[1] == 2 * 77
    latents = pipe.encode_image(picture("a"))
    assert latents.shape == (1, SIZE // 2, SIZE // 2, 4)
    np.testing.assert_allclose(pipe.encode_image(im.from_uint8(picture("a")[None])), latents, atol=1e-6)
    assert pipe.decode(latents).shape == (1, SIZE, SIZE, 3)
    assert pipe.encode_image(jnp.zeros((1, SIZE, SIZE, 3), jnp.bfloat16)).shape == latents.shape
    with pytest.raises(RequestError, match="image height 17 is not a multiple of 2"):
        pipe.encode_image(np.zeros((1, SIZE + 1, SIZE, 3), np.float32))
    with pytest.raises(RequestError, match="images are int32"):
        pipe.encode_image(np.zeros((1, SIZE, SIZE, 3), np.int32))
    with pytest.raises(RequestError, match=r"latents are \[1, 4, 8, 8\]; give \[B, h, w, 4\]"):
        pipe.decode(np.zeros((1, 4, 8, 8)))
    both = jnp.concatenate([latents, latents])
    eps = pipe.unet(both, 500, context)
    assert eps.shape == both.shape and eps.dtype == jnp.float32
    np.testing.assert_allclose(pipe.unet(latents, jnp.array([500.0]), context[1:]), eps[1:], atol=1e-5)


def test_options_are_those_of_the_methods():
    pipe, start = pipeline(), picture("a")
    for call in (
        pipe.text_to_image,
        lambda *a, **o: pipe.image_to_image(*a, start, **o),
        lambda *a, **o: pipe.inpaint(*a, start, MASK, **o),
    ):
        with pytest.raises(TypeError, match="stepz"):
            call("", stepz=3)
        with pytest.raises(RequestError, match="steps 0 is out of range"):
            call("", steps=0)


# ---- the pure functions ----------------------------------------------------------------------------------------------


def arguments(b: int) -> tuple:
    """(plan, tokens, seeds, guidance): PROMPTS in turn, for b pictures."""
    tokens = np.stack([TOKENIZER.encode(["", PROMPTS[i % 2]]).tokens for i in range(b)])
    return make_plan(MICRO.noise, STEPS), tokens, draws.seed_words(range(b)), np.full(b, 7.5, np.float32)


def pure(params, plan, tokens, seeds, guidance):
    return pl.text_to_image(SD(MICRO), params, plan, tokens, seeds, guidance, size=(SIZE, SIZE))


@pytest.mark.parametrize("over", ["vmap", "pmap"])
def test_the_same_one_by_one(over):
    assert jax.local_device_count() == 8
    plan, *rows = arguments(8)
    axes = (None, None, 0, 0, 0)
    spread = jax.pmap(pure, in_axes=axes) if over == "pmap" else jax.jit(jax.vmap(pure, axes))
    images = spread(params(), plan, *(row[:, None] for row in rows))
    assert images.shape == (8, 1, SIZE, SIZE, 3)
    assert apart(im.to_uint8(images[:2, 0]), make()) <= 1


def test_gradients_flow_through_the_steps():
    plan, tokens, seeds, guidance = arguments(1)
    noise = pl.starting_latents(SD(MICRO), seeds, (SIZE, SIZE))

    @jax.jit
    @jax.value_and_grad
    def brightness(noise, params):
        image = pl.text_to_image(SD(MICRO), params, plan, tokens, seeds, guidance, size=(SIZE, SIZE), latents=noise)
        return image.mean()

    value, slope = brightness(noise, params())
    size = float(jnp.linalg.norm(slope))
    assert np.isfinite(size) and size > 0
    moved, _ = brightness(noise + 0.05 * slope / size, params())
    assert float(moved - value) == pytest.approx(0.05 * size, rel=0.2)  # to first order


def test_v_prediction_is_the_same_network_told_otherwise():
    config = dataclasses.replace(MICRO, noise=dataclasses.replace(MICRO.noise, prediction="v_prediction"))
    plan, tokens, _, guidance = arguments(1)
    x, first = np.ones((1, 8, 8, 4), np.float32), jax.tree.map(lambda v: v[0], plan.steps)

    @jax.jit
    def both(params):
        denoisers = (pl.make_denoise(SD(c), params, tokens, guidance) for c in (MICRO, config))
        return [denoise(x, first)[0] for denoise in denoisers]

    out, eps = both(params())
    np.testing.assert_allclose(eps, first.alpha * out + first.sigma * x, rtol=1e-5, atol=1e-5)


# ---- loading ---------------------------------------------------------------------------------------------------------


def test_load_folders_and_files(tmp_path):
    write_diffusers(tmp_path / "folder", MICRO, params(), TOKENIZER)
    write_native(tmp_path / "model.safetensors", MICRO, params(), TOKENIZER)
    for name in ("folder", "model.safetensors"):
        pipe = sd_jax.load(tmp_path / name)
        assert pipe.sd.dtype == "float32" and pipe.report.path == str(tmp_path / name)
        np.testing.assert_array_equal(pipe.text_to_image(PROMPTS, steps=STEPS), make())


def test_load_refuses(tmp_path):
    with pytest.raises(RequestError, match="dtype 'int8' is not known; use one of float32, bfloat16, float16"):
        sd_jax.load(tmp_path, dtype="int8")
    with pytest.raises(RequestError, match="there is no model 'nothing'; give tiny, a folder or a file"):
        sd_jax.load("nothing")
