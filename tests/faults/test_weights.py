"""Checkpoints that are not what they should be: rows F26 to F31 and F33 to F36 of the list of faults."""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import socket
import sys
from unittest import mock

import flax.serialization
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from sd_jax.config import NANO
from sd_jax.tokenizer import Tokenizer
from sd_jax.types import RequestError, WeightsError
from sd_jax.weights import hub, other_models
from sd_jax.weights.convert import write_compvis, write_diffusers, write_native
from sd_jax.weights.other_models import recognise
from sd_jax.weights.safetensors_file import open_safetensors, write_safetensors
from sd_jax.weights.source import open_source
from sd_jax.weights.tables import parameter_shapes

TOKENIZER = Tokenizer.from_merges(())
COMMIT = "133a221b8aa7292a167afc5127cb63fb5005638b"


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(NANO)
    return {f"{c}/{path}": rng.standard_normal(s, np.float32) for c in shapes for path, s in shapes[c].items()}


@pytest.fixture(scope="module")
def written(tmp_path_factory, params):
    """The model once in each layout; tests copy what they break."""
    folder = tmp_path_factory.mktemp("written")
    write_diffusers(folder / "model", NANO, params, TOKENIZER)
    write_native(folder / "native.safetensors", NANO, params, TOKENIZER)
    write_compvis(folder / "compvis.safetensors", NANO, params)
    return folder


@pytest.fixture
def folder(tmp_path, written):
    copy = shutil.copytree(written / "model", tmp_path / "model")
    (copy / "SHA256SUMS").unlink()  # as a folder of another program has none; tests that want it copy for themselves
    return copy


def refused(source, *expected: str, error=WeightsError, **options) -> str:
    with pytest.raises(error) as caught:
        open_source(source, **options)
    message = str(caught.value)
    assert all(re.search(part, message) for part in expected), message
    return message


def save_compvis(path, arrays):
    safetensors.numpy.save_file(arrays, path)
    return {"source": path, "config": NANO, "tokenizer": TOKENIZER}


# ---- F27, F28 --------------------------------------------------------------------------------------------------


def test_a_truncated_file_says_how_many_bytes(tmp_path, written):
    whole = (written / "native.safetensors").read_bytes()
    path = tmp_path / "a.safetensors"
    for length in (100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path, "cut short", f"{length} there", "download it again")
    refused(path, f"{len(whole)} bytes expected, {len(whole) - 1} there")
    path.write_bytes(whole + b"x")
    refused(path, f"{len(whole)} bytes expected, {len(whole) + 1} there")


def test_a_component_that_is_missing(folder):
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    refused(folder, "vae has none of diffusion_pytorch_model.safetensors", "fetch the whole model")
    (folder / "unet" / "config.json").unlink()
    refused(folder, "no unet/config.json")


def test_a_flipped_bit_in_what_we_wrote(tmp_path, written):
    """The safetensors library reads on, whichever bit it is."""
    whole = (written / "native.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    path = tmp_path / "a.safetensors"
    for at in (header + 7, len(whole) - 3, whole.index(b"0.18215") + 5, whole.index(b"steps_offset") + 16):
        raw = bytearray(whole)
        raw[at] ^= 1
        path.write_bytes(raw)
        safetensors.numpy.load_file(path)
        with pytest.raises(WeightsError, match="does not match its SHA-256"):
            open_source(path).params()


# ---- F29 -------------------------------------------------------------------------------------------------------


def test_all_that_does_not_fit_is_in_one_table(tmp_path, written):
    arrays = safetensors.numpy.load_file(written / "compvis.safetensors")
    unet = "model.diffusion_model."
    arrays[f"{unet}out.2.biass"] = arrays.pop(f"{unet}out.2.bias")
    del arrays["first_stage_model.quant_conv.weight"]
    arrays[f"{unet}time_embed.0.weight"] = np.zeros((3, 4), np.float32)
    arrays["cond_stage_model.transformer.text_model.final_layer_norm.bias"] = np.zeros(32)
    arrays["unknown"] = np.zeros(1, np.float32)
    message = _message(save_compvis(tmp_path / "a.safetensors", arrays))
    assert message.splitlines()[1:] == [
        "  dtype    cond_stage_model.transformer.text_model.final_layer_norm.bias is float64; "
        "float32, bfloat16, float16 are read",
        f"  extra    {unet}out.2.biass [4]",
        "  extra    unknown [1]",
        "  missing  first_stage_model.quant_conv.weight",
        f"  missing  {unet}out.2.bias (nearest: {unet}out.2.biass)",
        f"  shape    {unet}time_embed.0.weight is [3, 4] where [64, 16] is expected",
    ]
    assert all(count in message.splitlines()[0] for count in ("1 shape", "1 dtype", "2 missing", "2 extra"))


def _message(options) -> str:
    with pytest.raises(WeightsError) as caught:
        open_source(**options)
    return str(caught.value)


def test_problems_of_all_components_come_together(folder):
    for part, file in (("unet", "diffusion_pytorch_model"), ("text_encoder", "model")):
        path = folder / part / f"{file}.safetensors"
        arrays = safetensors.numpy.load_file(path)
        arrays.pop(sorted(arrays)[0])
        safetensors.numpy.save_file(arrays, path)
    refused(folder, "2 missing", "missing  conv_in.bias", "missing  text_model.embeddings.position_embedding.weight")


# ---- F30 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtypes_that_are_read(tmp_path, written, params, dtype):
    kind = np.dtype({"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype))
    arrays = {k: a.astype(kind) for k, a in safetensors.numpy.load_file(written / "compvis.safetensors").items()}
    source = open_source(**save_compvis(tmp_path / "a.safetensors", arrays))
    expected = params["unet/conv_in/kernel"].astype(kind).astype(np.float32)
    np.testing.assert_array_equal(source.params()["unet"]["conv_in"]["kernel"], expected)


@pytest.mark.parametrize("dtype", ["float64", "int8", "float8_e4m3fn"])
def test_dtypes_that_are_not(tmp_path, written, dtype):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    raw = safetensors.numpy.load_file(written / "compvis.safetensors")
    name = "first_stage_model.quant_conv.bias"
    if dtype.startswith("float8"):
        path = tmp_path / "a.safetensors"
        raw[name] = raw[name].astype(kind)
        write_safetensors(path, [(k, a.shape, a.dtype, lambda a=a: a) for k, a in raw.items()], {})
        options = {"source": path, "config": NANO, "tokenizer": TOKENIZER}
    else:
        options = save_compvis(tmp_path / "a.safetensors", raw | {name: raw[name].astype(kind)})
    assert f"dtype    {name} is {dtype}; float32, bfloat16, float16 are read" in _message(options)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_values_that_are_not_finite(tmp_path, written, value, dtype):
    kind = np.dtype({"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype))
    arrays = safetensors.numpy.load_file(written / "compvis.safetensors")
    bad = arrays["first_stage_model.encoder.conv_in.weight"].astype(kind)
    bad[3, 1, 2, 0] = value
    arrays["first_stage_model.encoder.conv_in.weight"] = bad
    source = open_source(**save_compvis(tmp_path / "a.safetensors", arrays))
    with pytest.raises(WeightsError, match="vae/encoder/conv_in/kernel has NaN or infinite"):
        source.params()


def test_values_that_float16_cannot_hold(tmp_path, written):
    arrays = safetensors.numpy.load_file(written / "compvis.safetensors")
    arrays["first_stage_model.encoder.conv_in.weight"][0, 0, 0, 0] = 7e4
    source = open_source(**save_compvis(tmp_path / "a.safetensors", arrays))
    with pytest.raises(WeightsError, match="beyond the range of float16"):
        source.params("float16")
    with pytest.raises(RequestError, match="float64.*use float32, bfloat16, float16"):
        source.params("float64")


# ---- F31 -------------------------------------------------------------------------------------------------------

_TO_K = "transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(
    ("name", "shapes"),
    {
        "Stable Diffusion 2,": {f"model.diffusion_model.input_blocks.1.1.{_TO_K}": (320, 1024)},
        "Stable Diffusion 2, ": {"cond_stage_model.model.ln_final.weight": (1024,)},
        "Stable Diffusion XL": {"conditioner.embedders.0.transformer.text_model.final_layer_norm.bias": (768,)},
        "a diffusion transformer (Stable Diffusion 3 or Flux)": {
            "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (1, 1)
        },
        "a LoRA alone": {"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": (4, 320, 1, 1)},
        "a LoRA alone, ": {"unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": (4, 320)},
        "a ControlNet": {"control_model.input_blocks.0.0.weight": (320, 4, 3, 3)},
        "InstructPix2Pix": {"model.diffusion_model.input_blocks.0.0.weight": (320, 8, 3, 3)},
        "a textual inversion embedding": {"<toy>": (1, 768)},
        "an autoencoder alone": {"first_stage_model.encoder.conv_in.weight": (128, 3, 3, 3)},
        "an autoencoder alone;": {"encoder.conv_in.weight": (128, 3, 3, 3)},
        "a text encoder alone": {"text_model.final_layer_norm.bias": (768,)},
        "a diffusers UNet alone": {"down_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3)},
    }.items(),
)
def test_other_models_are_named(tmp_path, name, shapes):
    assert name.strip(" ,;") in recognise(shapes)
    arrays = {key: np.zeros(shape, np.float16) for key, shape in shapes.items()}
    safetensors.numpy.save_file(arrays, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", re.escape(f"a.safetensors is {name.strip(' ,;')}"))


def test_other_models_as_folders(folder):
    for width, name in ((1024, "Stable Diffusion 2"), (2048, "Stable Diffusion XL")):
        path = folder / "unet" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"cross_attention_dim": width}))
        refused(folder, name)


def test_the_inpainting_model_is_read(tmp_path):
    """Nine input channels: the config comes from the file's shape."""
    config = dataclasses.replace(NANO, unet=dataclasses.replace(NANO.unet, in_channels=9))
    shapes = parameter_shapes(config)
    zeros = {f"{c}/{path}": np.zeros(s, np.float32) for c in shapes for path, s in shapes[c].items()}
    write_compvis(tmp_path / "a.safetensors", config, zeros)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(other_models, "SD_V1_4", NANO)
        assert open_source(tmp_path / "a.safetensors", tokenizer=TOKENIZER).config == config


# ---- F33 -------------------------------------------------------------------------------------------------------


def hand_made(path, header: str, data: bytes = bytes(4)):
    raw = header.encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    ("header", "expected"),
    {
        f'{{"a":{ENTRY},"a":{ENTRY}}}': "key a twice",
        f'{{"a":{ENTRY.replace("}", "")},"shape":[1]}}}}': "key shape twice",
        f'{{"a":{ENTRY},"b":{ENTRY}}}': "twice or not at all",
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}': "shape that its bytes do not have",
        '{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,-4]}}': "shape that its bytes do not have",
        '{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}': "shape that its bytes do not have",
        '{"a":{"dtype":"F32","shape":[0],"data_offsets":[9,9]}}': "twice or not at all",
        '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}': "bytes expected",
        '{"a":{"dtype":"F4","shape":[1],"data_offsets":[0,4]}}': "a in F4",
        '{"a":[1]}': "something else than a tensor",
        '{"__metadata__":{"a":1}}': "not texts",
        f'{{"__metadata__":{{"sd_jax_sha256":"\\ud800"}},"a":{ENTRY}}}': "does not match its SHA-256",
        '{"a"': "not JSON",
        '{"a":' + "[" * 100_000: "not JSON",
    }.items(),
    ids=lambda v: v[:60].replace("\0", "") if v[:1] != "{" else None,
)
def test_headers_that_lie(tmp_path, header, expected):
    with pytest.raises(WeightsError, match=expected):
        open_safetensors(hand_made(tmp_path / "a.safetensors", header))


def test_no_safetensors_at_all(tmp_path):
    for content in (b"<html>", b"\xff" * 64, b"version https://git-lfs", b"12345678["):
        (tmp_path / "a.safetensors").write_bytes(content)
        refused(tmp_path / "a.safetensors", "not a safetensors file")


def test_native_metadata_that_is_no_config(tmp_path):
    for config in ("[" * 100_000, "[]", "{}x", '{"clip": 1}', '{"unet": {"widths": "abc"}}', '{"vae": {"groups": 7}}'):
        write_safetensors(tmp_path / "a.safetensors", [], {"format": "sd_jax", "config": config}, overwrite=True)
        refused(tmp_path / "a.safetensors", "cannot be used")


def test_flax_files_that_are_none(folder):
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    for tree in (5, [1], {"a": 1}, {"a": {"kernel": None}}, {"a": {3: np.zeros(2)}}):
        content = flax.serialization.msgpack_serialize(tree)
        for cut in (content, content[:-1], content + b"x"):
            (folder / "vae" / "diffusion_flax_model.msgpack").write_bytes(cut)
            refused(folder, "is not a Flax checkpoint|is empty")


# ---- F34, F35, F36 ---------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch, written):
    """A hub cache that holds the model at one commit, its large files as blobs named by their SHA-256."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repo = tmp_path / "hub" / "models--owner--name"
    snapshot = repo / "snapshots" / COMMIT
    shutil.copytree(written / "model", snapshot)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / "blobs").mkdir()
    for file in snapshot.glob("*/*.safetensors"):
        blob = repo / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(blob)
        file.symlink_to(os.path.relpath(blob, file.parent))
    return repo


@pytest.fixture
def no_network(monkeypatch):
    def blocked(*args, **kwargs):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", blocked)
    monkeypatch.setattr(socket, "getaddrinfo", blocked)


def test_a_cached_model_needs_no_network(cache, no_network, params):
    source = open_source("owner/name")
    assert source.report.revision == COMMIT
    np.testing.assert_array_equal(source.params()["vae"]["quant_conv"]["bias"], params["vae/quant_conv/bias"])


def test_a_model_that_is_not_cached_is_refused_quickly(cache, no_network):
    message = refused("owner/other", "https://huggingface.co/owner/other", "model_index.json", error=RequestError)
    assert "hf download owner/other" in message and "\n" not in message


def test_a_cached_file_that_has_changed(cache):
    blob = next(path for path in (cache / "blobs").iterdir() if path.stat().st_size > 100_000)
    raw = bytearray(blob.read_bytes())
    raw[-1] ^= 1
    blob.write_bytes(raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "fetch", lambda *args: cache / "snapshots" / COMMIT)
        refused("owner/name", "does not match the SHA-256 of the hub")


@pytest.mark.parametrize(
    ("kind", "expected"),
    {
        "GatedRepoError": "is gated: accept its licence there",
        "RepositoryNotFoundError": "does not exist, or not for you",
        "RevisionNotFoundError": "has no revision 'v9'",
        "LocalEntryNotFoundError": "not in the cache",
        "HfHubHTTPError": "cannot be fetched: 503",
    }.items(),
)
def test_what_the_hub_answers_is_one_line_without_a_token(monkeypatch, kind, expected):
    import huggingface_hub
    from huggingface_hub import errors

    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    def answer(*args, **kwargs):
        error = getattr(errors, kind)
        raise error("503 busy") if kind == "LocalEntryNotFoundError" else error("503 busy", response=mock.MagicMock())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    message = refused("owner/name", expected, error=RequestError, revision="v9")
    assert "owner/name" in message and "\n" not in message and "hf_secret" not in message


@pytest.mark.parametrize("error", ["ReadTimeout", "ProxyError", "RemoteProtocolError", RuntimeError])
def test_a_line_that_breaks_in_the_middle(monkeypatch, error):
    """What the library has downloaded with raises errors of its own, and not all of them are OSErrors."""
    import huggingface_hub
    from huggingface_hub import errors

    http = sys.modules[errors.HTTPError.__module__.partition(".")[0]]
    error = getattr(http, error) if isinstance(error, str) else error

    def answer(*args, **kwargs):
        raise error("the peer closed the connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", answer)
    refused("owner/name", "cannot be fetched: the peer closed the connection; try again", error=RequestError)


@pytest.mark.parametrize(
    "source",
    [
        "nowhere",
        "./nowhere/x",
        "a/b/c",
        "x.ckpt",
        "models/sd.ckpt",
        "m/x.safetensors",
        "",
        "n" * 5000,
        "a\0b",
        "~nobody/x/y",
    ],
)
def test_sources_that_are_not_there(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(source, "there is no model|no unet/config.json|is not a diffusers folder", error=RequestError)
