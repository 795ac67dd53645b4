"""Whole pictures against diffusers' pipelines: the same checkpoint folder, prompts, noise and settings."""

import dataclasses
import functools
import sys

import numpy as np
import pytest
from PIL import Image

from sd_jax import pipeline as pl
from sd_jax.diffusion import draws
from sd_jax.pipeline import SD
from sd_jax.weights.convert import write_compvis, write_diffusers
from tests.micro import MICRO, TOKENIZER, params, picture, pipeline
from tests.parity.reference import assert_same_pictures, diffusers, torch

STEPS, SIZE = 10, 32
PROMPTS, NEGATIVE, GUIDANCE = ["a red cube", "a blue sphere behind a cone"], "a gray cylinder", 5.0
SEEDS = [0, 1]
INPAINTING = dataclasses.replace(MICRO, unet=dataclasses.replace(MICRO.unet, in_channels=9))
MASK = np.zeros((SIZE, SIZE), np.uint8)
MASK[8:, :20] = 255
SCHEDULERS = {
    "ddim": ("DDIMScheduler", {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),  # as in v1-4's own configuration
    "euler": ("EulerDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
}
SETTINGS = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "np"}

pytestmark = pytest.mark.usefixtures("highest")


@pytest.fixture(scope="module")
def referee(tmp_path_factory):
    """-> diffusers' pipeline of a config, with the same random parameters."""

    @functools.cache
    def make(config):
        folder = tmp_path_factory.mktemp("model") / "diffusers"
        write_diffusers(folder, config, params(config), TOKENIZER)
        made = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        assert isinstance(made.scheduler, diffusers.DDIMScheduler)
        return made

    return make


def as_kind(kind, made):
    """The models of one pipeline in a pipeline of another kind."""
    other = kind(**made.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


def noises() -> tuple["torch.Tensor", "torch.Tensor"]:
    """What our pictures of SEEDS start from, and what their posteriors are sampled with; NCHW."""
    words = draws.seed_words(SEEDS)
    starting = pl.starting_latents(SD(MICRO), words, (SIZE, SIZE))
    posterior = draws.draw(draws.fold(draws.keys(words), draws.POSTERIOR), starting)
    return tuple(torch.from_numpy(np.array(noise).transpose(0, 3, 1, 2)) for noise in (starting, posterior))


def inject(monkeypatch, kind):
    """Both draws of diffusers' edit pipelines are made ours."""
    starting, posterior = noises()
    for module, noise in ((kind.__module__, starting), ("diffusers.models.autoencoders.vae", posterior)):
        monkeypatch.setattr(sys.modules[module], "randn_tensor", lambda *args, noise=noise, **kwargs: noise)


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_text_to_image(referee, sampler):
    made = as_kind(diffusers.StableDiffusionPipeline, referee(MICRO))
    name, options = SCHEDULERS[sampler]
    made.scheduler = getattr(diffusers, name).from_config(made.scheduler.config, **options)
    theirs = made(
        PROMPTS, height=SIZE, width=SIZE, latents=noises()[0], negative_prompt=[NEGATIVE] * 2, **SETTINGS
    ).images
    ours = pipeline().text_to_image(
        PROMPTS,
        negative=NEGATIVE,
        seeds=SEEDS,
        steps=STEPS,
        guidance=GUIDANCE,
        sampler=sampler,
        height=SIZE,
        width=SIZE,
    )
    assert_same_pictures(ours, theirs)


def test_v_prediction(tmp_path):
    """What the network predicts stands in the scheduler's config alone."""
    config = dataclasses.replace(MICRO, noise=dataclasses.replace(MICRO.noise, prediction="v_prediction"))
    write_diffusers(tmp_path / "v", config, params(), TOKENIZER)
    made = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "v", safety_checker=None)
    assert made.scheduler.config.prediction_type == "v_prediction"
    theirs = made(PROMPTS, height=SIZE, width=SIZE, latents=noises()[0], **SETTINGS).images
    options = {"seeds": SEEDS, "steps": STEPS, "guidance": GUIDANCE, "height": SIZE, "width": SIZE}
    ours = pl.load(tmp_path / "v").text_to_image(PROMPTS, **options)
    assert_same_pictures(ours, theirs)
    assert (pipeline().text_to_image(PROMPTS, **options) != ours).any()


def test_a_single_file_makes_the_same_picture_in_diffusers(referee, tmp_path):
    write_compvis(tmp_path / "single.safetensors", MICRO, params())
    write_diffusers(tmp_path / "configs", MICRO, params(), TOKENIZER)
    made = diffusers.StableDiffusionPipeline.from_single_file(
        str(tmp_path / "single.safetensors"),
        config=str(tmp_path / "configs"),
        local_files_only=True,
        safety_checker=None,
    )
    for name in ("unet", "vae", "text_encoder"):
        expected = getattr(referee(MICRO), name).state_dict()
        for key, value in getattr(made, name).state_dict().items():
            assert torch.equal(value, expected[key]), key
    theirs = made(PROMPTS, height=SIZE, width=SIZE, latents=noises()[0], **SETTINGS).images
    again = referee(MICRO)(PROMPTS, height=SIZE, width=SIZE, latents=noises()[0], **SETTINGS).images
    np.testing.assert_array_equal(theirs, again)
    ours = pl.load(tmp_path / "single.safetensors", tokenizer=TOKENIZER).text_to_image(
        PROMPTS, seeds=SEEDS, steps=STEPS, guidance=GUIDANCE, height=SIZE, width=SIZE
    )
    assert_same_pictures(ours, theirs)


def test_image_to_image(referee, monkeypatch):
    kind = diffusers.StableDiffusionImg2ImgPipeline
    inject(monkeypatch, kind)
    start = np.stack([picture(name, SIZE, SIZE) for name in "ab"])
    theirs = as_kind(kind, referee(MICRO))(
        PROMPTS, image=[Image.fromarray(image) for image in start], strength=0.65, **SETTINGS
    ).images
    ours = pipeline().image_to_image(PROMPTS, start, strength=0.65, seeds=SEEDS, steps=STEPS, guidance=GUIDANCE)
    assert_same_pictures(ours, theirs)


@pytest.mark.parametrize("config", [MICRO, INPAINTING], ids=["4 channels", "9 channels"])
def test_inpaint(referee, monkeypatch, config):
    kind = diffusers.StableDiffusionInpaintPipeline
    inject(monkeypatch, kind)
    start = np.stack([picture(name, SIZE, SIZE) for name in "ab"])
    theirs = as_kind(kind, referee(config))(
        PROMPTS,
        image=[Image.fromarray(image) for image in start],
        mask_image=[Image.fromarray(MASK)] * 2,
        height=SIZE,
        width=SIZE,
        strength=1.0,
        **SETTINGS,
    ).images
    ours = pipeline(config).inpaint(PROMPTS, start, MASK, seeds=SEEDS, steps=STEPS, guidance=GUIDANCE)
    assert_same_pictures(ours, theirs)
