"""The command line on a checkpoint of exactly v1-4's layout and size, against diffusers' own pipeline.

Random weights, written by torch as sd-v1-4.ckpt was; one small picture, which must be the one that diffusers makes.
(That every other layout gives the same weights, test_full_size_layouts.py finds out.) Two minutes, 10 GiB of memory
and 9 GB of disk. ``pytest --no-full`` leaves it out.
"""

import gc
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sd_jax.config import SD_V1_4
from sd_jax.diffusion import draws
from sd_jax.pipeline import SD, starting_latents
from sd_jax.weights.files import FOLDERS
from sd_jax.weights.tables import COMPONENTS
from tests.full_size import averaged_beside_plain, compvis_state, full_vocabulary
from tests.lightning import save_checkpoint
from tests.parity.reference import assert_same_pictures, build, diffusers, torch, transformers
from tests.random_weights import checkpoint
from tests.test_config import V1_4

pytestmark = pytest.mark.full

PROMPT, NEGATIVE, SEED, STEPS, GUIDANCE = "an astronaut riding a horse", "blurry", 3, 2, 4.0
SIZE = (256, 320)  # height and width: the UNet is compared at 512x512 elsewhere, and this takes a third of the time


def diffusers_picture(tokenizer: Path, modules: dict[str, torch.nn.Module]) -> np.ndarray:
    """float [1, 256, 320, 3] in [0, 1], from the noise that ``SEED`` has here."""
    pipe = diffusers.StableDiffusionPipeline(
        vae=modules["vae"],
        text_encoder=modules["clip"],
        tokenizer=transformers.CLIPTokenizer.from_pretrained(tokenizer),
        unet=modules["unet"],
        scheduler=diffusers.PNDMScheduler.from_config(V1_4["scheduler"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    noise = np.asarray(starting_latents(SD(SD_V1_4), draws.seed_words([SEED]), SIZE))
    return pipe(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        height=SIZE[0],
        width=SIZE[1],
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        output_type="np",
    ).images


def command_line(folder: Path, *argv: str) -> tuple[np.ndarray, str]:
    """One run of ``sd-jax txt2img`` in a process of its own -> (its picture [256, 320, 3], what it said)."""
    command = [sys.executable, "-m", "sd_jax", "txt2img", PROMPT, f"--negative={NEGATIVE}", f"--seed={SEED}"]
    command += [
        f"--steps={STEPS}",
        f"--guidance={GUIDANCE}",
        f"--height={SIZE[0]}",
        f"--width={SIZE[1]}",
        "--no-progress",
        "--out",
        str(folder / "out"),
        *argv,
    ]
    env = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(Path(__file__).parents[2])}
    env.pop("XLA_FLAGS", None)  # compiled as users have it
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return np.asarray(Image.open(done.stdout.strip())), done.stderr


def test_the_command_line_makes_diffusers_picture(tmp_path):
    tensors = {component: checkpoint(component, SD_V1_4) for component in COMPONENTS}
    modules = {name: build(name, V1_4[FOLDERS[name]], own) for name, own in tensors.items()}
    full_vocabulary().save(tmp_path / "tokenizer")
    theirs = diffusers_picture(tmp_path / "tokenizer", modules)
    state = compvis_state(tensors)
    del modules, tensors
    save_checkpoint(tmp_path / "sd.ckpt", averaged_beside_plain(state))
    del state
    gc.collect()

    argv = ["--model", str(tmp_path / "sd.ckpt"), "--tokenizer", str(tmp_path / "tokenizer"), "--ema=yes"]
    ours, said = command_line(tmp_path, *argv)
    assert "CreativeML OpenRAIL-M" in said
    assert_same_pictures(ours[None], theirs)
    (tmp_path / "sd.ckpt").unlink()
