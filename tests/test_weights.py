"""Tables, the two-sided check, and the way from every layout to every other, on random weights of NANO."""

import dataclasses
import json
import os
import re
import shutil

import flax.serialization
import flax.traverse_util
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from sd_jax.config import NANO, SD_V1_4
from sd_jax.tokenizer import Tokenizer
from sd_jax.types import RequestError, WeightsError
from sd_jax.weights.convert import convert, write_compvis, write_diffusers, write_native
from sd_jax.weights.parameters import Held, match, to_parameters
from sd_jax.weights.safetensors_file import open_safetensors, write_safetensors
from sd_jax.weights.source import open_source
from sd_jax.weights.tables import COMPONENTS, LAYOUTS, parameter_shapes, table

TOKENIZER = Tokenizer.from_merges(())  # 514 tokens, as NANO has


def random_params(config=NANO, dtype=np.float32, seed=0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        f"{component}/{path}": rng.standard_normal(shape, np.float32).astype(dtype)
        for component, shapes in parameter_shapes(config).items()
        for path, shape in shapes.items()
    }


def theirs(layout: str, params, config=NANO, name=lambda row: row.names[0]) -> dict[str, dict[str, np.ndarray]]:
    """Component -> name -> array, as another program would have saved them."""
    return {
        c: {
            name(row): np.ascontiguousarray(row.transform.to_theirs(params[f"{c}/{row.path}"]))
            for row in table(layout, c, config)
        }
        for c in COMPONENTS
    }


def merged(components: dict[str, dict]) -> dict:
    return {name: array for tensors in components.values() for name, array in tensors.items()}


def assert_same(source, params, dtype=np.float32):
    flat = flax.traverse_util.flatten_dict(source.params(dtype), sep="/")
    assert flat.keys() == params.keys()
    for path, array in flat.items():
        assert array.dtype == dtype and array.flags.writeable, path
        np.testing.assert_array_equal(array, params[path].astype(dtype), err_msg=path)


@pytest.fixture(scope="module")
def params():
    return random_params()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, params):
    folder = tmp_path_factory.mktemp("model") / "diffusers"
    write_diffusers(folder, NANO, params, TOKENIZER)
    return folder


@pytest.fixture
def compvis(tmp_path, params):
    path = tmp_path / "model.safetensors"
    write_compvis(path, NANO, params)
    return path


def open_compvis(path, **options):
    return open_source(path, config=NANO, tokenizer=TOKENIZER, **options)


# ---- tables ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("config", [NANO, SD_V1_4], ids=["nano", "v1-4"])
def test_tables_are_bijective(layout, config):
    names = []
    for component in COMPONENTS:
        rows = table(layout, component, config)
        assert sorted(row.path for row in rows) == sorted(parameter_shapes(config)[component])
        names.append([name for row in rows for name in row.names])
    groups = [sum(names, [])] if layout == "compvis" else names
    assert all(len(set(group)) == len(group) for group in groups)


def test_the_released_model_has_its_known_size():
    shapes = parameter_shapes(SD_V1_4)
    sizes = {c: (len(s), sum(int(np.prod(shape)) for shape in s.values())) for c, s in shapes.items()}
    assert sizes == {"clip": (196, 123_060_480), "unet": (686, 859_520_964), "vae": (248, 83_653_863)}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_transforms_undo_themselves(layout):
    rng = np.random.default_rng(0)
    for component in COMPONENTS:
        shapes = parameter_shapes(NANO)[component]
        for row in table(layout, component, NANO):
            ours = rng.standard_normal(shapes[row.path])
            stored = row.transform.to_theirs(ours)
            assert stored.shape == row.transform.shape(ours.shape)
            np.testing.assert_array_equal(row.transform.to_ours(stored), ours)
            for shape in row.transform.accepts(ours.shape):
                np.testing.assert_array_equal(row.transform.to_ours(stored.reshape(shape)), ours)


def test_names_of_the_released_checkpoint():
    """Spot checks against names in sd-v1-4.ckpt, where numbering is easy to get wrong."""
    known = {
        "down_0_attn_1/cross_attn/k/kernel": "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight",
        "down_0_downsample/conv/kernel": "input_blocks.3.0.op.weight",
        "down_3_res_1/conv1/kernel": "input_blocks.11.0.in_layers.2.weight",
        "up_3_res_0/skip/kernel": "output_blocks.0.0.skip_connection.weight",
        "up_3_upsample/conv/kernel": "output_blocks.2.1.conv.weight",
        "up_2_upsample/conv/bias": "output_blocks.5.2.conv.bias",
        "up_0_attn_2/ff/proj_out/bias": "output_blocks.11.1.transformer_blocks.0.ff.net.2.bias",
        "time_embedding/fc2/bias": "time_embed.2.bias",
    }
    rows = {row.path: row.names[0] for row in table("compvis", "unet", SD_V1_4)}
    assert {path: rows[path].removeprefix("model.diffusion_model.") for path in known} == known


# ---- layouts ---------------------------------------------------------------------------------------------------


def test_a_diffusers_folder_comes_back(folder, params):
    source = open_source(folder)
    assert source.config == NANO and source.report.layout == "diffusers" and source.licence is None
    assert source.tokenizer.vocab == TOKENIZER.vocab
    assert_same(source, params)


def test_a_compvis_file_comes_back(compvis, params):
    source = open_compvis(compvis)
    assert source.report.layout == "compvis" and source.report.ema is None
    assert_same(source, params)


def test_a_native_file_comes_back(tmp_path, params):
    tokenizer = TOKENIZER.with_words("<toy>")
    config = dataclasses.replace(NANO, clip=dataclasses.replace(NANO.clip, vocab_size=515))
    params = random_params(config)
    nested = flax.traverse_util.unflatten_dict(params, sep="/")
    write_native(tmp_path / "a.safetensors", config, nested, tokenizer)
    source = open_source(tmp_path / "a.safetensors")
    assert source.config == config and source.report.layout == "native"
    assert (source.tokenizer.vocab, source.tokenizer.words) == (tokenizer.vocab, tokenizer.words)
    assert_same(source, params)


def test_every_layout_converts_to_every_other_bit_by_bit(tmp_path, folder, params):
    options = {"config": NANO, "tokenizer": TOKENIZER}
    chain = ["native", "compvis", "diffusers", "compvis", "native", "diffusers"]
    at = folder
    for i, to in enumerate(chain):
        dest = tmp_path / (f"{i}" if to == "diffusers" else f"{i}.safetensors")
        convert(at, dest, to=to, **(options if i and chain[i - 1] == "compvis" else {}))
        at = dest
    assert_same(open_source(at), params)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"{i}" + ("" if c == "diffusers" else ".safetensors") for i, c in enumerate(chain)
    ]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_round_trips_are_bit_identical(tmp_path, compvis, params, dtype):
    """CompVis -> native -> diffusers -> CompVis -> native, as the torch world and back: nothing but names changes."""
    chain = [("n", "native"), ("d", "diffusers"), ("c", "compvis"), ("n2", "native")]
    at, options = compvis, {"tokenizer": TOKENIZER}
    for name, to in chain:
        convert(at, tmp_path / name, to=to, dtype=dtype if name == "n" else None, verify=False, **options)
        at, options = tmp_path / name, {"tokenizer": TOKENIZER} if to == "compvis" else {}
    first, last = ({k: t.read() for k, t in open_safetensors(tmp_path / name)[0].items()} for name in ("n", "n2"))
    assert first.keys() == last.keys() == params.keys()
    for path, array in first.items():
        expected = params[path].astype(array.dtype)
        assert array.dtype == jnp.dtype(dtype) and array.tobytes() == last[path].tobytes() == expected.tobytes(), path


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtypes(tmp_path, folder, params, dtype):
    kind = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    convert(folder, tmp_path / "a.safetensors", dtype=dtype)
    source = open_source(tmp_path / "a.safetensors")
    assert {parameter.dtype for parameter in source.parameters.values()} == {np.dtype(kind)}
    assert_same(source, {path: array.astype(kind) for path, array in params.items()})
    assert_same(source, params, kind)


def test_place_is_called_tensor_by_tensor(folder, params):
    seen = []
    result = open_source(folder).params(place=lambda path, array: seen.append((path, array.dtype)) or path)
    assert seen == [(path, np.float32) for path in dict(seen)] and dict(seen).keys() == params.keys()
    assert result["unet"]["conv_in"]["kernel"] == "unet/conv_in/kernel"


def test_the_embedded_model_opens():
    source = open_source("tiny")
    assert source.licence is None and source.parameters.keys() == random_params(source.config).keys()


def test_a_path_wins_over_a_hub_id(tmp_path, monkeypatch, params):
    monkeypatch.chdir(tmp_path)
    os.mkdir("owner")
    write_diffusers("owner/name", NANO, params, TOKENIZER)
    assert open_source("owner/name").report.path == "owner/name"
    with pytest.raises(RequestError, match="leave it out"):
        open_source("owner/name", revision="main")


def test_writing_is_atomic_and_never_overwrites(tmp_path, params):
    for write, dest in ((write_native, "a.safetensors"), (write_diffusers, "a")):
        write(tmp_path / dest, NANO, params, TOKENIZER)
        with pytest.raises(RequestError, match="there already"):
            write(tmp_path / dest, NANO, params, TOKENIZER)
        broken = params | {"vae/quant_conv/bias": np.full(8, np.nan, np.float32)}
        with pytest.raises(WeightsError, match="vae/quant_conv/bias has NaN"):
            write(tmp_path / dest, NANO, broken, TOKENIZER, overwrite=True)
        assert_same(open_source(tmp_path / dest), params)
        write(tmp_path / dest, NANO, random_params(seed=1), TOKENIZER, overwrite=True)
        assert_same(open_source(tmp_path / dest), random_params(seed=1))
    assert sorted(os.listdir(tmp_path)) == ["a", "a.safetensors"]
    with pytest.raises(RequestError, match="there is no folder"):
        write_native(tmp_path / "x" / "a.safetensors", NANO, params, TOKENIZER)


def test_overwriting_replaces_only_a_thing_of_its_kind(tmp_path, params):
    (tmp_path / "photos").mkdir()
    for name in ("photos/a.jpg", "file"):
        (tmp_path / name).write_bytes(b"precious")
    for write, dest, message in (
        (write_diffusers, "photos", "is no diffusers folder"),
        (write_diffusers, "file", "is no diffusers folder"),
        (write_native, "photos", "is a folder"),
    ):
        with pytest.raises(RequestError, match=message):
            write(tmp_path / dest, NANO, params, TOKENIZER, overwrite=True)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.jpg", "file", "photos"]
    assert {(tmp_path / name).read_bytes() for name in ("photos/a.jpg", "file")} == {b"precious"}


# ---- what history left behind ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("naming", [0, 1, 2])
@pytest.mark.parametrize("ndim", [2, 4])
def test_vae_attention_in_three_namings_and_two_shapes(params, layout, naming, ndim):
    stored = theirs(layout, params, name=lambda row: row.names[min(naming, len(row.names) - 1)])["vae"]
    attention = [name for name in stored if "attn" in name or "attentions" in name]
    for name in attention:
        if stored[name].ndim > 1:
            stored[name] = stored[name].reshape(stored[name].shape[:2] + (1, 1)[: ndim - 2])
    assert any(part in name for name in attention for part in (".to_q.", ".query.", ".q."))
    rows = {f"vae/{row.path}": row for row in table(layout, "vae", NANO)}
    found, problems = match(rows, NANO, {name: Held(array) for name, array in stored.items()})
    assert problems == []
    for path, parameter in found.items():
        np.testing.assert_array_equal(parameter.read(), params[path])


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_text_encoder_prefix_and_position_ids(tmp_path, params, compvis, prefix):
    arrays = safetensors.numpy.load_file(compvis)
    start = "cond_stage_model.transformer."
    arrays = {name.replace(f"{start}text_model.", start + prefix): array for name, array in arrays.items()}
    arrays[f"{start}{prefix}embeddings.position_ids"] = np.arange(77)[None]
    arrays |= {
        "betas": np.zeros(1000),
        "model_ema.decay": np.full((), 0.9, np.float32),
        "sqrt_alphas_cumprod": np.ones(3),
    }
    safetensors.numpy.save_file(arrays, tmp_path / "b.safetensors")
    assert_same(open_compvis(tmp_path / "b.safetensors"), params)


def with_ema(arrays, averaged) -> dict[str, np.ndarray]:
    """The averaged UNet as LitEma keeps it: names of the model without their dots."""
    renamed = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): array
        for name, array in averaged.items()
        if name.startswith("model.diffusion_model.")
    }
    return {
        **arrays,
        **renamed,
        "model_ema.decay": np.ones((), np.float32),
        "model_ema.num_updates": np.ones((), np.int32),
    }


def test_averaged_weights(tmp_path, params):
    other = random_params(seed=1)
    averaged = params | {path: other[path] for path in params if path.startswith("unet/")}
    arrays = with_ema(merged(theirs("compvis", params)), merged(theirs("compvis", averaged)))
    path = tmp_path / "full-ema.safetensors"
    safetensors.numpy.save_file(arrays, path)
    for ema, expected, used in ((None, averaged, True), (True, averaged, True), (False, params, False)):
        source = open_compvis(path, ema=ema)
        assert_same(source, expected)
        assert source.report.ema is used and bool(source.report.notes) == (ema is None)
    only = {name: array for name, array in arrays.items() if not name.startswith("model.diffusion_model.")}
    safetensors.numpy.save_file(only, tmp_path / "ema-only.safetensors")
    source = open_compvis(tmp_path / "ema-only.safetensors")
    assert_same(source, averaged)
    assert source.report.ema is True and source.report.notes == ()


def test_averaged_weights_asked_for_and_not_there(compvis):
    with pytest.raises(WeightsError, match=r"no averaged \(EMA\) weights"):
        open_compvis(compvis, ema=True)


def test_a_file_without_config_takes_one_from_a_folder(compvis, folder, params):
    assert_same(open_source(compvis, config=folder), params)  # and its tokenizer
    with pytest.raises(RequestError, match="has its own configs"):
        open_source(folder, config=NANO)


def test_flax_files(tmp_path, folder, params):
    """As diffusers-Flax wrote them: its names and axes, our values."""
    shutil.copytree(folder, tmp_path / "flax")
    words = {"scale": "scale", "embedding": "embedding", "kernel": "kernel", "bias": "bias"}
    for component, file in (("clip", "flax_model"), ("unet", "diffusion_flax_model"), ("vae", "diffusion_flax_model")):
        part = tmp_path / "flax" / {"clip": "text_encoder"}.get(component, component)
        for old in part.glob("*.safetensors"):
            old.unlink()
        flat = {}
        for row in table("diffusers", component, NANO):
            module, _, _ = row.names[0].rpartition(".")
            array = params[f"{component}/{row.path}"]
            if row.transform.shape(array.shape)[2:] == (1, 1):
                array = array[None, None]  # a 1x1 convolution, HWIO
            if component != "clip":
                module = re.sub(r"\.(\d+)(?=\.|$)", r"_\1", module)
            flat[f"{module}.{words[row.path.rpartition('/')[2]]}"] = array
        tree = flax.traverse_util.unflatten_dict(flat, sep=".")
        (part / f"{file}.msgpack").write_bytes(flax.serialization.to_bytes(tree))
    assert_same(open_source(tmp_path / "flax"), params)


def test_non_ema_and_fp16_variants(tmp_path, folder, params):
    shutil.copytree(folder, tmp_path / "v")
    (tmp_path / "v" / "SHA256SUMS").unlink()  # the folder is changed on purpose
    unet = tmp_path / "v" / "unet"
    with pytest.raises(WeightsError, match="non_ema.safetensors"):
        open_source(tmp_path / "v", ema=False)
    other = random_params(seed=1)
    safetensors.numpy.save_file(
        theirs("diffusers", other)["unet"], unet / "diffusion_pytorch_model.non_ema.safetensors"
    )
    plain = params | {path: other[path] for path in params if path.startswith("unet/")}
    assert_same(open_source(tmp_path / "v", ema=False), plain)
    assert_same(open_source(tmp_path / "v"), params)
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    half = {name: array.astype(np.float16) for name, array in theirs("diffusers", other)["unet"].items()}
    safetensors.numpy.save_file(half, unet / "diffusion_pytorch_model.fp16.safetensors")
    source = open_source(tmp_path / "v")
    assert source.report.notes == ("unet: only the float16 variant is there, and it is used",)
    source = open_source(tmp_path / "v", variant="fp16")
    assert source.parameters["unet/conv_in/kernel"].dtype == np.float16
    assert source.report.notes == tuple(
        f"{name}: there is no variant fp16, and the plain weights are used" for name in ("text_encoder", "vae")
    )
    with pytest.raises(RequestError, match="has no variant bf16; leave variant out"):
        safetensors.numpy.save_file(half, unet / "diffusion_pytorch_model.safetensors")
        open_source(tmp_path / "v", variant="bf16")
    with pytest.raises(RequestError, match="variant '../x' is no part of a file's name"):
        open_source(tmp_path / "v", variant="../x")
    with pytest.raises(RequestError, match="is one file, without variants"):
        write_native(tmp_path / "n.safetensors", NANO, params, TOKENIZER)
        open_source(tmp_path / "n.safetensors", variant="fp16")


def test_sharded_weights(tmp_path, folder, params):
    shutil.copytree(folder, tmp_path / "s")
    unet = tmp_path / "s" / "unet"
    arrays = list(safetensors.numpy.load_file(unet / "diffusion_pytorch_model.safetensors").items())
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    index = {}
    for i, part in enumerate((arrays[:300], arrays[300:])):
        file = f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors"
        safetensors.numpy.save_file(dict(part), unet / file)
        index |= {name: file for name, _ in part}
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert_same(open_source(tmp_path / "s"), params)
    (unet / file).unlink()
    with pytest.raises(WeightsError, match="00002-of-00002.safetensors, missing beside it"):
        open_source(tmp_path / "s")
    for odd in (5, [1], {}, None):
        (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": odd}))
        with pytest.raises(WeightsError, match="names no files, missing beside it; fetch the whole model"):
            open_source(tmp_path / "s")


# ---- safetensors -----------------------------------------------------------------------------------------------


def test_safetensors_agree_with_the_library(tmp_path):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.ones((), np.float16),
        "c": np.zeros((0, 3), np.int64),
        "d": np.arange(4).astype(ml_dtypes.bfloat16),
        "e": np.array([True, False]),
    }
    safetensors.numpy.save_file(arrays, tmp_path / "lib.safetensors", {"k": "v"})
    tensors, metadata = open_safetensors(tmp_path / "lib.safetensors")
    assert metadata == {"k": "v"} and tensors.keys() == arrays.keys()
    entries = [(name, a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()]
    write_safetensors(tmp_path / "own.safetensors", entries, {"k": "v"})
    theirs = safetensors.numpy.load_file(tmp_path / "own.safetensors")
    ours, metadata = open_safetensors(tmp_path / "own.safetensors")
    assert metadata["k"] == "v"
    for name, array in arrays.items():
        for other in (tensors[name].read(), theirs[name], ours[name].read()):
            assert (other.dtype, other.shape) == (array.dtype, array.shape)
            np.testing.assert_array_equal(other, array)


def test_parameters_from_arrays_are_checked(params):
    broken = {path: array for path, array in params.items() if path != "unet/conv_in/bias"}
    with pytest.raises(WeightsError, match="missing  unet/conv_in/bias"):
        to_parameters(NANO, broken)
