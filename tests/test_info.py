"""``sd-jax info`` on every kind of file: it says what there is, and is right."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import safetensors.numpy

from sd_jax.cli import main
from sd_jax.config import SD_V1_4
from sd_jax.types import RequestError, WeightsError
from sd_jax.weights import info as module
from sd_jax.weights.convert import convert, write_compvis, write_diffusers
from sd_jax.weights.info import as_text, inspect
from sd_jax.weights.published import NAMES
from sd_jax.weights.source import open_source
from sd_jax.weights.tables import COMPONENTS, parameter_shapes
from tests.full_size import full_vocabulary
from tests.lightning import save_checkpoint, torch
from tests.micro import MICRO, TOKENIZER, micro_file, params
from tests.test_weights import with_ema

SIZES = {c: sum(int(np.prod(s)) for s in shapes.values()) for c, shapes in parameter_shapes(MICRO).items()}


@pytest.fixture(scope="module")
def compvis(tmp_path_factory):
    path = tmp_path_factory.mktemp("info") / "sd.safetensors"
    write_compvis(path, MICRO, params())
    return path


def counts(info):
    return {name: part["parameters"] for name, part in info["parts"].items()}


def test_a_native_file():
    info = inspect(micro_file())
    assert info["runs"] and info["layout"] == "native file" and info["why_not"] is None
    assert counts(info) == SIZES and info["licence"] is None and info["ema"] is None
    assert info["files"] == [
        {
            "path": "micro.safetensors",
            "bytes": micro_file().stat().st_size,
            "kind": "safetensors",
            "sha256": hashlib.sha256(micro_file().read_bytes()).hexdigest(),
            "published": None,
        }
    ]
    assert info["not_finite"] == info["damaged"] == info["ignored"] == []
    assert info["tensors"]["unet/conv_in/kernel"] == {"shape": [3, 3, 4, 16], "dtype": "float32", "part": "unet"}
    assert len(info["tensors"]) == sum(map(len, parameter_shapes(MICRO).values()))
    json.dumps(info)


def test_a_lightning_checkpoint(tmp_path, compvis, monkeypatch):
    arrays = safetensors.numpy.load_file(compvis)
    state = with_ema(arrays, arrays) | {"betas": np.zeros(1000)}
    path = save_checkpoint(tmp_path / "sd.ckpt", {name: torch.from_numpy(a) for name, a in state.items()})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(module.PUBLISHED, digest, "sd-v1-4.ckpt")
    monkeypatch.setattr(module, "MANY_EMA", 10)
    monkeypatch.setattr("sd_jax.weights.parameters.MANY_EMA", 10)  # MICRO has fewer tensors than v1's threshold
    info = inspect(path, config=MICRO)
    assert info["runs"] and info["layout"] == "CompVis file" and info["files"][0]["kind"] == "torch zip"
    assert info["ema"] == "averaged and plain" and info["files"][0]["published"] == "sd-v1-4.ckpt"
    assert counts(info) == SIZES | {"averaged": SIZES["unet"] + 2, "other": 1000}
    assert {"optimizer_states", "callbacks", "betas", "model_ema.decay"} <= set(info["ignored"])
    assert any(name.startswith("pytorch_lightning.") for name in info["foreign"])
    text = as_text(info)
    assert f"SHA-256 {digest}, the published sd-v1-4.ckpt" in text and "averaged UNet" in text


def test_a_diffusers_folder(tmp_path):
    write_diffusers(tmp_path / "m", MICRO, params(), TOKENIZER, dtype="float16")
    (tmp_path / "m" / "safety_checker").mkdir()
    (tmp_path / "m" / "unet" / "diffusion_pytorch_model.non_ema.bin").write_bytes(b"")
    info = inspect(tmp_path / "m")
    assert (
        info["runs"]
        and info["layout"] == "diffusers folder"
        and info["ignored"] == ["safety_checker/", "unet/diffusion_pytorch_model.non_ema.bin"]
    )
    assert [file["path"] for file in info["files"]][0] == "text_encoder/model.safetensors" and counts(info) == SIZES
    assert all(set(part["dtypes"]) == {"float16"} for part in info["parts"].values())
    assert "unet/conv_in.weight" in info["tensors"] and info["prediction"] == "epsilon"
    assert "float16" in as_text(info) and "\n  conv_in" not in as_text(info)
    assert "unet/conv_in.weight  [16, 4, 3, 3] float16" in as_text(info, tensors=True)


def test_v1_4_has_a_licence(tmp_path):
    """Weights of v1-4's shape, in a sparse file of 2 GB that takes no room; nothing is read but names."""
    path = tmp_path / "big.safetensors"
    header, end = {}, 0
    for component in COMPONENTS:
        for name, shape in parameter_shapes(SD_V1_4)[component].items():
            size = 2 * int(np.prod(shape))
            header[f"{component}/{name}"] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
            end += size
    metadata = {"format": "sd_jax", "config": json.dumps(dataclasses.asdict(SD_V1_4))}
    raw = json.dumps({"__metadata__": metadata, **header}).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    with open(path, "r+b") as file:
        file.truncate(8 + len(raw) + end)
    info = inspect(path, verify=False, tokenizer=full_vocabulary())
    assert info["licence"] == "CreativeML OpenRAIL-M" and info["model"] == "Stable Diffusion v1"
    assert counts(info) == {"clip": 123_060_480, "unet": 859_520_964, "vae": 83_653_863}
    assert "sha256" not in info["files"][0] and "not_finite" not in info


@pytest.mark.parametrize(
    ("shapes", "model"),
    [
        ({"lora_unet_down_blocks_0_proj_in.lora_down.weight": (4, 8)}, "a LoRA alone"),
        ({"conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": (8,)}, "Stable Diffusion XL"),
        ({"cond_stage_model.model.ln_final.weight": (8,)}, "Stable Diffusion 2"),
        ({"something": (3,)}, None),
    ],
)
def test_other_models_are_told_and_not_an_error(tmp_path, shapes, model, capsys):
    safetensors.numpy.save_file({n: np.ones(s, np.float16) for n, s in shapes.items()}, tmp_path / "a.safetensors")
    info = inspect(tmp_path / "a.safetensors")
    assert not info["runs"] and info["model"] == model and info["why_not"]
    assert main(["info", str(tmp_path / "a.safetensors")]) == 0
    assert (model or "not known") in capsys.readouterr().out


def test_one_network(tmp_path):
    write_diffusers(tmp_path / "m", MICRO, params(), TOKENIZER)
    for name, component in {"text_encoder": "clip", "unet": "unet", "vae": "vae"}.items():
        for path in (tmp_path / "m" / name, next((tmp_path / "m" / name).glob("*.safetensors"))):
            info = inspect(path)
            assert counts(info) == {component: SIZES[component]} and not info["runs"]
            assert f"this with --part {component}" in info["why_not"] and "alone" in info["model"]


def test_values_that_are_not_finite(tmp_path, compvis):
    arrays = safetensors.numpy.load_file(compvis)
    arrays["first_stage_model.quant_conv.bias"][:2] = np.nan, np.inf
    safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors")
    info = inspect(tmp_path / "a.safetensors", config=MICRO)
    assert info["not_finite"] == ["first_stage_model.quant_conv.bias (2 values)"]
    assert "NaN or infinite in first_stage_model.quant_conv.bias (2 values)" in as_text(info)


def test_what_was_converted_says_from_what(tmp_path, capsys):
    convert(micro_file(), tmp_path / "a.safetensors", to="compvis")
    assert "written by" in as_text(inspect(tmp_path / "a.safetensors"))
    assert main(["info", "--json", str(tmp_path / "a.safetensors")]) == 0
    assert json.loads(capsys.readouterr().out)["record"]["source"] == "micro.safetensors"
    assert open_source(tmp_path / "a.safetensors", tokenizer=TOKENIZER).record["source"] == "micro.safetensors"


def test_broken_files_are_an_error(tmp_path, capsys):
    (tmp_path / "a.ckpt").write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(WeightsError, match="cut short"):
        inspect(tmp_path / "a.ckpt")
    with pytest.raises(RequestError, match="holds no model"):
        inspect(tmp_path)
    assert main(["info", str(tmp_path / "a.ckpt")]) == main(["info", str(tmp_path / "none.ckpt")]) == 2
    assert capsys.readouterr().err.count("\n") == 2


def test_the_published_digests_are_digests():
    assert all(len(digest) == 64 and int(digest, 16) for digest in NAMES) and len(set(NAMES.values())) == len(NAMES)
    assert NAMES["fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556"] == "sd-v1-4.ckpt"
