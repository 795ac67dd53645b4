"""What sd_jax wrote is known again, to the last bit and to the numbers it computes: rows F28 and F32 of the list."""

import dataclasses
import json
import shutil
import subprocess

import numpy as np
import pytest
import safetensors.numpy

from sd_jax.cli import main
from sd_jax.types import WeightsError
from sd_jax.weights import convert as converting
from sd_jax.weights.convert import convert, write_compvis
from sd_jax.weights.info import inspect
from sd_jax.weights.probe import probe
from sd_jax.weights.source import open_source
from tests.micro import MICRO, TOKENIZER, micro_file, params


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert(micro_file(), folder, to="diffusers")
    return folder


@pytest.fixture
def copy(tmp_path, folder):
    return shutil.copytree(folder, tmp_path / "model")


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# ---- F28 -------------------------------------------------------------------------------------------------------


def test_a_folder_has_a_list_that_sha256sum_checks(folder):
    names = {line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == there - {"SHA256SUMS"}
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=folder, check=True)


@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json"])
def test_a_small_file_that_was_changed(copy, name):
    with open(copy / name, "a") as file:
        file.write(" ")
    with pytest.raises(WeightsError, match=f"{name} is not what was written there.*take it out of SHA256SUMS"):
        open_source(copy)
    open_source(copy, verify=False)
    listed = (copy / "SHA256SUMS").read_text().splitlines(keepends=True)
    (copy / "SHA256SUMS").write_text("".join(line for line in listed if name not in line))
    open_source(copy)


def test_weights_that_were_replaced_by_a_file_without_sums(copy):
    path = copy / "vae" / "diffusion_pytorch_model.safetensors"
    arrays = safetensors.numpy.load_file(path)
    arrays["quant_conv.bias"] += 1
    safetensors.numpy.save_file(arrays, path)
    with pytest.raises(WeightsError, match="vae/diffusion_pytorch_model.safetensors is not what was written there"):
        open_source(copy)


def test_a_list_that_names_files_elsewhere_reads_none(copy):
    (copy / "SHA256SUMS").write_text("".join(f"{'0' * 64}  {name}\n" for name in ("/etc/passwd", "../x", "a/../../x")))
    open_source(copy)


@pytest.mark.parametrize("at", [-1, -5000, 0.5])
def test_a_flipped_bit_is_named_unless_that_is_asked_for(tmp_path, at, capsys):
    raw = bytearray(micro_file().read_bytes())
    raw[int(at * len(raw)) if isinstance(at, float) else at] ^= 4
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw)
    with pytest.raises(WeightsError, match="does not match its SHA-256"):
        open_source(path).params()
    open_source(path, verify=False).params()
    assert main(["txt2img", "x", "--model", str(path), "--steps", "1", "--out", str(tmp_path / "out")]) == 2
    assert main(["convert", str(path), str(tmp_path / "b.safetensors")]) == 2
    assert main(["info", str(path)]) == 2
    out, err = capsys.readouterr()
    assert err.count("does not match its SHA-256; get the file again") == 3 and "damaged" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "out"]
    assert main(["txt2img", "x", "--model", str(path), "--no-verify", "--steps=1", f"--out={tmp_path / 'out'}"]) == 0


# ---- F32 -------------------------------------------------------------------------------------------------------


def test_a_conversion_records_a_probe_and_the_next_agrees(tmp_path, folder):
    recorded = open_source(folder).record
    assert recorded["source"] == "micro.safetensors" and recorded["layout"] == "native"
    assert {name: len(numbers) for name, numbers in recorded["probe"].items()} == dict.fromkeys(
        ("text", "unet", "encode", "decode"), 16
    )
    convert(folder, tmp_path / "c.safetensors", to="compvis")
    convert(tmp_path / "c.safetensors", tmp_path / "n.safetensors", tokenizer=TOKENIZER, dtype="bfloat16")
    assert open_source(tmp_path / "c.safetensors", tokenizer=TOKENIZER).record["probe"] == recorded["probe"]
    half = open_source(tmp_path / "n.safetensors").record["probe"]
    assert half != recorded["probe"]
    found = inspect(folder, run_probe=True)["probe"]
    assert found["same"] is True and found["numbers"] == recorded["probe"]


@pytest.mark.parametrize(
    ("name", "values", "output"),
    [
        ("unet", {"norm_num_groups": 16}, "unet"),
        ("unet", {"attention_head_dim": 4}, "unet"),
        ("unet", {"norm_eps": 1e-2}, "unet"),
        ("vae", {"norm_num_groups": 2}, "encode|decode"),
        ("text_encoder", {"num_attention_heads": 4}, "text"),
        ("text_encoder", {"hidden_act": "gelu"}, "text"),
    ],
)
def test_a_config_that_fits_the_shapes_and_is_wrong(tmp_path, copy, name, values, output, capsys):
    """It loads without a word, as nothing of its shapes is wrong; the next conversion and ``info --probe`` tell."""
    change(copy / name / "config.json", **values)
    (copy / "SHA256SUMS").unlink()
    open_source(copy)
    with pytest.raises(
        WeightsError, match=rf"does not compute what was recorded with it: ({output}) is off by .*heads"
    ):
        convert(copy, tmp_path / "a.safetensors")
    assert not list(tmp_path.glob("*.safetensors*"))
    assert inspect(copy, run_probe=True)["probe"]["same"] is False
    assert main(["info", "--probe", str(copy)]) == 2
    assert "does not compute what was recorded with it" in capsys.readouterr().err
    convert(copy, tmp_path / "a.safetensors", verify=False)
    assert "probe" not in open_source(tmp_path / "a.safetensors").record


def test_a_config_given_against_the_one_that_the_file_carries(tmp_path):
    write_compvis(tmp_path / "a.safetensors", MICRO, params())
    wrong = dataclasses.replace(MICRO, unet=dataclasses.replace(MICRO.unet, heads=(4,)))
    with pytest.raises(WeightsError, match=r"another config than the one given \(unet.heads \(4,\) not \(2,\)\)"):
        open_source(tmp_path / "a.safetensors", config=wrong, tokenizer=TOKENIZER)
    other_noise = dataclasses.replace(MICRO, noise=dataclasses.replace(MICRO.noise, sampler="euler"))
    assert open_source(tmp_path / "a.safetensors", config=other_noise, tokenizer=TOKENIZER).config == other_noise


def test_a_converter_that_would_write_another_config(tmp_path, monkeypatch):
    """The written model is opened again, as whoever gets it will."""
    honest = converting.to_diffusers

    def wrong(config):
        jsons = honest(config)
        jsons["unet"]["norm_num_groups"] *= 2
        return jsons

    monkeypatch.setattr(converting, "to_diffusers", wrong)
    with pytest.raises(WeightsError, match="would be another model .*unet.groups 16 not 8"):
        convert(micro_file(), tmp_path / "a", to="diffusers")
    assert not list(tmp_path.iterdir())


def test_networks_that_run_away_are_recorded_as_that(tmp_path):
    """Random weights overflow; JSON has no NaN."""
    huge = {path: np.full(p.shape, 1e30, np.float32) for path, p in open_source(micro_file()).parameters.items()}
    write_compvis(tmp_path / "a.safetensors", MICRO, huge)
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", tokenizer=TOKENIZER)
    record = open_source(tmp_path / "b.safetensors").record
    assert None in record["probe"]["unet"] and "NaN" not in json.dumps(record)
    convert(tmp_path / "b.safetensors", tmp_path / "c.safetensors")


@pytest.mark.parametrize("record", ["[]", "{", '{"probe": 5}', '{"probe": {"unet": ["a"]}}', '{"probe": {"x": 1}}'])
def test_a_record_that_is_none(copy, record):
    (copy / "sd_jax.json").write_text(record)
    (copy / "SHA256SUMS").unlink()
    with pytest.raises(WeightsError, match="cannot be used|is not JSON|where an object is expected"):
        open_source(copy)


def test_the_probe_of_one_model_is_always_the_same():
    source = open_source(micro_file())
    assert probe(source.config, source.parameters) == probe(source.config, source.parameters)
