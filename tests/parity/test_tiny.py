"""The embedded model is a diffusers folder: torch opens it, and makes the same pictures from the same noise."""

import numpy as np

import sd_jax
from sd_jax.diffusion import draws
from sd_jax.pipeline import starting_latents
from sd_jax.weights.source import TINY
from tests.parity.reference import assert_same_pictures, diffusers, torch

PROMPTS = ["a red cube on top of a blue sphere", "a photo of a yellow cylinder to the left of a gray sphere"]


def test_diffusers_makes_the_same_pictures(highest):
    ours = sd_jax.load("tiny")
    size = (ours.sd.config.default_size,) * 2
    noise = np.asarray(starting_latents(ours.sd, draws.seed_words([0, 1]), size))
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(TINY, safety_checker=None, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        PROMPTS,
        num_inference_steps=10,
        guidance_scale=3.0,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        output_type="np",
    ).images
    images = ours.text_to_image(PROMPTS, seed=0, steps=10, guidance=3.0)
    assert_same_pictures(images, expected)
