"""The command line on checkpoints of exactly v1-4's layout and size, against diffusers' own pipeline.

Random weights, written by torch in each of the layouts that v1-4 was published in; one 512x512 picture of each, which
must be the one that diffusers makes. Five minutes, 10 GiB of memory and 9 GB of disk. ``pytest --no-full`` leaves it
out.
"""

import gc
import itertools
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
from sd_jax.tokenizer import Tokenizer
from sd_jax.weights.tables import COMPONENTS, parameter_shapes, table
from tests.lightning import save_checkpoint
from tests.parity.reference import assert_same_pictures, build, diffusers, torch, transformers
from tests.random_weights import checkpoint
from tests.test_config import V1_4

pytestmark = pytest.mark.full

PROMPT, NEGATIVE, SEED, STEPS, GUIDANCE = "an astronaut riding a horse", "blurry", 3, 2, 4.0
FOLDERS = {"clip": "text_encoder", "unet": "unet", "vae": "vae"}


def full_vocabulary() -> Tokenizer:
    """As many tokens as CLIP's: bytes, and pairs of them."""
    symbols = [token for token in Tokenizer.from_merges(()).vocab if len(token) == 1]
    return Tokenizer.from_merges(tuple(itertools.islice(itertools.product(symbols, symbols), 48_894)))


def save_folder(folder: Path, modules: dict[str, torch.nn.Module]) -> None:
    """The diffusers layout, of which torch's own libraries write the weights and the configs."""
    for name, module in modules.items():
        module.save_pretrained(folder / FOLDERS[name])
    diffusers.PNDMScheduler.from_config(V1_4["scheduler"]).save_pretrained(folder / "scheduler")
    full_vocabulary().save(folder / "tokenizer")


def diffusers_picture(folder: Path, modules: dict[str, torch.nn.Module]) -> np.ndarray:
    """float [1, 512, 512, 3] in [0, 1], from the noise that ``SEED`` has here."""
    pipe = diffusers.StableDiffusionPipeline(
        vae=modules["vae"],
        text_encoder=modules["clip"],
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=modules["unet"],
        scheduler=diffusers.PNDMScheduler.from_pretrained(folder / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    noise = np.asarray(starting_latents(SD(SD_V1_4), draws.seed_words([SEED]), (512, 512)))
    return pipe(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()),
        output_type="np",
    ).images


def compvis_state(tensors: dict[str, dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """The tensors of ``checkpoint`` by component, under the names and with the axes of CompVis' own files."""
    state = {}
    for component, own in tensors.items():
        shapes = parameter_shapes(SD_V1_4)[component]
        rows = {row.path: row for row in table("compvis", component, SD_V1_4)}
        for row in table("diffusers", component, SD_V1_4):
            theirs, array = rows[row.path], own[row.names[0].removeprefix("text_model.")]
            state[theirs.names[0]] = torch.from_numpy(array).reshape(theirs.transform.shape(shapes[row.path]))
    return state


def averaged_beside_plain(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The UNet's weights as the averaged ones, and zeros, all of one storage, in place of the plain ones."""
    unet = [name for name in state if name.startswith("model.diffusion_model.")]
    zeros = torch.zeros(max(state[name].numel() for name in unet))
    plain = {name: zeros[: state[name].numel()].view(state[name].shape) for name in unet}
    averaged = {"model_ema." + name.removeprefix("model.").replace(".", ""): state[name] for name in unet}
    positions = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    return {**state, **plain, **averaged, **positions, "model_ema.decay": torch.tensor(0.9999)}


def command_line(folder: Path, *argv: str) -> tuple[np.ndarray, str]:
    """One run of ``sd-jax txt2img`` in a process of its own -> (its picture [512, 512, 3], what it said)."""
    command = [sys.executable, "-m", "sd_jax", "txt2img", PROMPT, f"--negative={NEGATIVE}", f"--seed={SEED}"]
    command += [f"--steps={STEPS}", f"--guidance={GUIDANCE}", "--no-progress", "--out", str(folder / "out"), *argv]
    env = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(Path(__file__).parents[2])}
    env.pop("XLA_FLAGS", None)  # compiled as users have it
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return np.asarray(Image.open(done.stdout.strip())), done.stderr


def test_every_published_layout_makes_diffusers_picture(tmp_path):
    from safetensors.torch import save_file  # needs torch

    tensors = {component: checkpoint(component, SD_V1_4) for component in COMPONENTS}
    modules = {name: build(name, V1_4[FOLDERS[name]], own) for name, own in tensors.items()}
    save_folder(tmp_path / "model", modules)
    theirs = diffusers_picture(tmp_path / "model", modules)
    state = compvis_state(tensors)
    del modules, tensors
    save_checkpoint(tmp_path / "sd.ckpt", averaged_beside_plain(state))
    save_file(state, tmp_path / "sd.safetensors")
    del state
    gc.collect()

    ours, said = command_line(tmp_path, "--model", str(tmp_path / "model"))
    assert "CreativeML OpenRAIL-M" in said
    assert_same_pictures(ours[None], theirs)
    for name, extra in {"sd.ckpt": ["--ema=yes"], "sd.safetensors": []}.items():
        argv = ["--model", str(tmp_path / name), "--tokenizer", str(tmp_path / "model" / "tokenizer"), *extra]
        picture, said = command_line(tmp_path, *argv)
        assert "CreativeML OpenRAIL-M" not in said, "once is enough"
        np.testing.assert_array_equal(picture, ours, err_msg=name)
        (tmp_path / name).unlink()
