"""Every layout that v1 weights come in, at exactly v1-4's size, and every one that is written: the same bits.

Random weights, written by torch, safetensors and Flax. Four minutes, 14 GiB of memory and 14 GB of disk. ``pytest
--no-full`` leaves it out.
"""

import gc
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import flax.serialization
import flax.traverse_util
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.config import SD_V1_4
from sd_jax.weights.convert import convert
from sd_jax.weights.files import FOLDERS
from sd_jax.weights.mapped import ahead
from sd_jax.weights.source import Source, open_source
from sd_jax.weights.tables import COMPONENTS, table
from tests.full_size import averaged_beside_plain, compvis_state, full_vocabulary
from tests.lightning import save_checkpoint
from tests.parity.reference import diffusers, torch, transformers
from tests.random_weights import checkpoint
from tests.test_config import V1_4

pytestmark = pytest.mark.full

RESULT, MORE = 4_264_941_228, 500_000_000  # bytes: the parameters in float32, and what a conversion may take besides


def digests(source: Source, dtype=None) -> dict[str, str]:
    """The SHA-256 of every parameter in our axes, none of which stays in memory."""

    def digest(path: str) -> tuple[str, str]:
        array = source.parameters[path].read(dtype)
        return path, hashlib.sha256(memoryview(array.reshape(-1).view(np.uint8))).hexdigest()

    return dict(ahead(digest, source.parameters))


def write_configs(folder: Path) -> None:
    for name in (*FOLDERS.values(), "scheduler"):
        (folder / name).mkdir(parents=True)
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / name / file).write_text(json.dumps(V1_4[name]))
    full_vocabulary().save(folder / "tokenizer")


def save_safetensors(path: Path, tensors: dict[str, "torch.Tensor"]) -> None:
    from safetensors.torch import save_file  # needs torch

    save_file(tensors, path)


def save_flax(path: Path, component: str, tensors: dict[str, "torch.Tensor"]) -> None:
    """As diffusers-Flax did: its names and axes."""
    flat = {}
    for row in table("diffusers", component, SD_V1_4):
        module, _, _ = row.names[0].rpartition(".")
        array = tensors[row.names[0]].numpy()
        leaf = row.path.rpartition("/")[2]
        if leaf == "kernel":
            array = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
        module = module if component == "clip" else re.sub(r"\.(\d+)(?=\.|$)", r"_\1", module)
        flat[f"{module}.{leaf}"] = array
    path.write_bytes(flax.serialization.to_bytes(flax.traverse_util.unflatten_dict(flat, sep=".")))


def save_folder(folder: Path, form: str, tensors: dict[str, dict[str, "torch.Tensor"]]) -> None:
    """The weights of a diffusers folder in one of the forms they come in, in place of those that are there."""
    for component, own in tensors.items():
        for old in (folder / FOLDERS[component]).glob("*model*"):
            old.unlink()
        path, clip = folder / FOLDERS[component], component == "clip"
        match form:
            case "safetensors":
                save_safetensors(path / f"{'model' if clip else 'diffusion_pytorch_model'}.safetensors", own)
            case "fp16":
                half = {name: tensor.half() for name, tensor in own.items()}
                save_safetensors(path / f"{'model' if clip else 'diffusion_pytorch_model'}.fp16.safetensors", half)
            case "bin":
                torch.save(own, path / f"{'pytorch_model' if clip else 'diffusion_pytorch_model'}.bin")
            case "flax":
                save_flax(path / f"{'flax_model' if clip else 'diffusion_flax_model'}.msgpack", component, own)


# The peak that wait4() tells of a process starts at its parent's; this one is of the program alone.
_CONVERT = """
import sys
from sd_jax.cli import main
status = main(["convert", *sys.argv[1:]])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM:")))
sys.exit(status)
"""


def convert_by_command(source: Path, dest: Path, *argv: str) -> int:
    """``sd-jax convert`` in a process of its own -> its peak memory in bytes, mapped files and all."""
    env = os.environ | {"XDG_CACHE_HOME": str(dest.parent / "cache"), "PYTHONPATH": str(Path(__file__).parents[2])}
    env.pop("XLA_FLAGS", None)  # compiled as users have it
    command = [sys.executable, "-c", _CONVERT, str(source), str(dest), *argv]
    written, peak = subprocess.run(command, env=env, stdout=subprocess.PIPE, check=True, text=True).stdout.split()
    assert written == str(dest)
    return int(peak) * 1024


def assert_torch_opens(folder: Path) -> None:
    """diffusers and transformers open what we wrote, and find the very numbers that ``checkpoint`` gave."""
    kinds = {"clip": transformers.CLIPTextModel, "unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    for component, kind in kinds.items():
        state = kind.from_pretrained(folder / FOLDERS[component]).state_dict()
        for name, array in checkpoint(component, SD_V1_4).items():
            assert torch.equal(state.pop(name), torch.from_numpy(array)), name
        assert not [name for name in state if "position_ids" not in name]


def test_every_layout_is_read_and_written_bit_by_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)  # what is soon deleted need not reach the disk: minutes less
    tensors = {component: checkpoint(component, SD_V1_4) for component in COMPONENTS}
    state, model, tokenizer = compvis_state(tensors), tmp_path / "model", tmp_path / "model" / "tokenizer"
    write_configs(model)
    ckpt = save_checkpoint(tmp_path / "sd.ckpt", averaged_beside_plain(state))
    source = open_source(ckpt, tokenizer=tokenizer)
    assert source.config == SD_V1_4 and source.report.ema is True and "optimizer_states" in source.report.ignored
    expected, half = digests(source), digests(source, "float16")

    save_safetensors(tmp_path / "sd.safetensors", state)
    assert digests(open_source(tmp_path / "sd.safetensors", tokenizer=tokenizer)) == expected, "safetensors"
    (tmp_path / "sd.safetensors").unlink()
    prefix = {"clip": "text_model.", "unet": "", "vae": ""}  # of the files of v1, not of transformers' module
    tensors = {c: {prefix[c] + n: torch.from_numpy(a) for n, a in own.items()} for c, own in tensors.items()}
    for form in ("safetensors", "bin", "flax"):
        save_folder(model, form, tensors)
        assert digests(open_source(model)) == expected, form
    save_folder(model, "fp16", tensors)
    assert digests(open_source(model)) == half, "fp16"
    for component in FOLDERS.values():
        for weights in (model / component).glob("*.safetensors"):
            weights.unlink()
    del tensors, state, source
    gc.collect()

    native = tmp_path / "native.safetensors"
    peak = convert_by_command(ckpt, native, "--tokenizer", str(tokenizer))
    print(f"sd-jax convert: {peak / 1e9:.2f} GB at most")
    assert peak < RESULT + MORE
    ckpt.unlink()
    assert digests(open_source(native)) == expected, "ckpt -> native"
    for dtype in ("float32", "float16", "bfloat16"):
        first = tmp_path / f"{dtype}.safetensors"
        if dtype == "float32":
            native.rename(first)
        else:
            convert(tmp_path / "float32.safetensors", first, dtype=dtype, verify=False)
        wanted = {"float32": expected, "float16": half}.get(dtype) or digests(open_source(first))
        round_trip(tmp_path, first, tokenizer, dtype, wanted)
        if dtype != "float32":
            first.unlink()


def round_trip(folder: Path, native: Path, tokenizer: Path, dtype: str, expected: dict[str, str]) -> None:
    """native -> diffusers -> CompVis -> native; in float32 torch opens what lies on the way."""
    convert(native, folder / "d", to="diffusers", verify=False)
    if dtype == "float32":
        assert_torch_opens(folder / "d")
        assert "CreativeML OpenRAIL-M" in (folder / "d" / "LICENSE_NOTICE.txt").read_text()
    convert(folder / "d", folder / "c.safetensors", to="compvis", verify=False)
    shutil.rmtree(folder / "d")
    if dtype == "float32":
        from safetensors.torch import load_file

        state = load_file(folder / "c.safetensors")
        for component in COMPONENTS:
            for name, tensor in compvis_state({component: checkpoint(component, SD_V1_4)}).items():
                assert torch.equal(state.pop(name), tensor), name
        assert not state
    convert(folder / "c.safetensors", folder / "n.safetensors", tokenizer=tokenizer, verify=False)
    (folder / "c.safetensors").unlink()
    source = open_source(folder / "n.safetensors")
    assert {parameter.dtype for parameter in source.parameters.values()} == {jnp.dtype(dtype)}
    assert digests(source) == expected, dtype
    (folder / "n.safetensors").unlink()
