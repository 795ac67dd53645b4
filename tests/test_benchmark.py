"""The benchmark: what it reports of a toy model. The numbers themselves are the machine's."""

import json
import subprocess
from pathlib import Path

import flax.serialization
import jax
import numpy as np
import pytest

from sd_jax import flags
from sd_jax.config import NANO
from sd_jax.tokenizer import Tokenizer
from sd_jax.types import RequestError
from sd_jax.weights.convert import convert, write_native
from sd_jax.weights.source import open_source
from sd_jax.weights.tables import parameter_shapes
from tools import benchmark, benchmark_weights


def test_report_of_the_text_tower(nano_params, tmp_path, capsys):
    model, out = tmp_path / "nano.safetensors", tmp_path / "report.json"
    write_native(model, NANO, nano_params, Tokenizer.from_merges(()))
    before = jax.config.jax_compilation_cache_dir
    events = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    argv = ["--model", str(model), "--what", "text", "--batch", "2", "--repeat", "3", "--json", str(out)]
    report = benchmark.main(argv)

    assert json.loads(out.read_text()) == report
    assert report["command"].startswith("python tools/benchmark.py --model")
    assert report["settings"]["dtype"] == "float32" and report["settings"]["size"] == [NANO.default_size] * 2
    (result,) = report["results"]
    seconds = result["seconds"]
    assert len(seconds["all"]) == 3 and 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
    assert result["per_second"] == 2 / seconds["median"]
    assert all(value > 0 for how in ("cold", "warm") for value in result["compile"][how].values())
    assert events.count("/jax/compilation_cache/cache_hits") == 1, "the second compilation must read the cache"
    assert result["memory"]["process_peak"] > 50 * benchmark.MIB
    assert result["memory"]["program"]["output"] == 2 * 2 * 77 * NANO.clip.width * 4  # float32 [2, 2, 77, width]
    assert "| text | 2 |" in capsys.readouterr().out
    assert jax.config.jax_compilation_cache_dir == before


@pytest.mark.parametrize("name", benchmark.PARTS)
def test_every_part_has_a_program(name, nano_params):
    """Traced only. Batch 3, so that no other axis could be taken for the batch's."""
    sd = benchmark.pipeline.SD(NANO)
    args = benchmark._parse(["--batch", "3", "--steps", "2", "--size", "16", "24"])
    case = benchmark.make_case(name, sd, nano_params, args)
    shape = {
        "txt2img": (3, 16, 24, 3),
        "unet": (3, 2, 2, 3, 4),
        "text": (3, 2, 77, NANO.clip.width),
        "encode": (3, 2, 3, 4),
        "decode": (3, 16, 24, 3),
    }
    assert jax.eval_shape(case.function, *case.args).shape == shape[name]


def test_first_picture_is_one_command_with_an_empty_cache_and_then_a_warm_one(monkeypatch, tmp_path):
    seen = []

    def run(command, *, env, check, stdout):
        cache = env["XDG_CACHE_HOME"]
        assert env["HF_HOME"] == f"{tmp_path}/huggingface", "downloads are not part of the time"
        seen.append((command, cache, benchmark.Path(cache).exists()))
        benchmark.Path(cache).mkdir(exist_ok=True)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HOME", raising=False)
    args = benchmark._parse(["--what", "first", "--steps", "9", "--size", "64", "128", "--dtype", "bfloat16"])
    results = benchmark.first_picture(args)
    (command, cache, warm), again = seen
    assert command[1:4] == ["-m", "sd_jax", "txt2img"] and again == (command, cache, True) and not warm
    assert " --steps 9 " in " ".join(command) and " --height 64 --width 128" in " ".join(command)
    assert [result["what"] for result in results] == ["first, empty cache", "first, warm cache"]
    with pytest.raises(RequestError, match="v1-4-random"):
        benchmark.first_picture(benchmark._parse(["--what", "first", "--model", "v1-4-random"]))


def test_random_parameters_have_the_models_own_shapes():
    flat = benchmark.flax.traverse_util.flatten_dict(benchmark.random_params(NANO), sep="/")
    shapes = {f"{c}/{path}": shape for c, paths in parameter_shapes(NANO).items() for path, shape in paths.items()}
    assert {path: leaf.shape for path, leaf in flat.items()} == shapes
    assert all(np.isfinite(leaf).all() and leaf.dtype == np.float32 for leaf in flat.values())


# ---- weights -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    benchmark_weights.write_base(NANO, folder := tmp_path_factory.mktemp("weights") / "base")
    return folder


def make(layout, base, folder):
    """-> the model in a layout, and how it is opened."""
    if layout in benchmark_weights.BY_TORCH:
        pytest.importorskip("torch")
    path = folder / f"source{benchmark_weights.SUFFIXES.get(layout, '')}"
    benchmark_weights.make("nano", layout, str(base), str(path))
    return str(path), benchmark_weights._options(layout, base)


@pytest.mark.parametrize("layout", benchmark_weights.LAYOUTS)
def test_the_model_in_each_layout(layout, base, tmp_path):
    source, options = make(layout, base, tmp_path)
    opened = open_source(source, **options)
    assert opened.config == NANO
    assert benchmark_weights.unlike_drawn("nano", layout, source, options) == {"unlike": []}
    files = list(map(str, benchmark_weights.weight_files(Path(source))))
    loaded = benchmark_weights.load(source, options, verify=False)
    assert loaded["bytes"] == sum(np.prod(p.shape) * p.dtype.itemsize for p in opened.parameters.values())
    assert loaded["bytes"] < sum(benchmark.os.path.getsize(file) for file in files)
    assert benchmark_weights.read_as_peer(layout, files)["files"] == len(files)
    if layout == "ckpt":
        assert opened.report.ema and any("lightning" in name for name in opened.report.foreign)
    if layout == "fp16":
        assert {parameter.dtype.name for parameter in opened.parameters.values()} == {"float16"}


def test_flax_files_are_what_flax_itself_writes(tmp_path):
    tree = benchmark_weights._flax_tree(NANO, "vae")
    benchmark_weights._save_flax(tree, tmp_path / "a.msgpack")
    assert (tmp_path / "a.msgpack").read_bytes() == flax.serialization.to_bytes(tree)


def test_a_single_bit_is_a_difference(base, tmp_path):
    source, options = make("safetensors", base, tmp_path)
    changed = bytearray(Path(source).read_bytes())
    changed[-4] ^= 1
    (tmp_path / "b.safetensors").write_bytes(changed)
    other = str(tmp_path / "b.safetensors")
    assert benchmark_weights.unlike_source(source, options, source, options) == {"unlike": []}
    (path,) = benchmark_weights.unlike_source(source, options, other, options)["unlike"]
    assert benchmark_weights.unlike_drawn("nano", "safetensors", other, options) == {"unlike": [path]}
    assert benchmark_weights._verdict([path]) == f"1 differ ({path})"


def run_in_this_process(monkeypatch, **instead):
    """``instead`` has results of functions by name -> the names of those that are called."""
    seen = []

    def here(function, *args):
        seen.append(function.__name__)
        return {**function(*args), "peak": 1 << 20, **instead.get(function.__name__, {})}

    def command(words, *, XDG_CACHE_HOME):
        assert words[1:3] == ["-m", "sd_jax"] and not Path(XDG_CACHE_HOME).exists(), "a first run"
        args = flags.parse(words[3:])
        seen.append(args.command)
        convert(args.source, args.dest, to=args.to, **flags.given(args, flags.SOURCE), verify=False)
        return {"seconds": 1.0, "cpu": 1.0, "peak": 1 << 20}

    monkeypatch.setattr(benchmark_weights, "in_process", here)
    monkeypatch.setattr(benchmark_weights, "run", command)
    return seen


@pytest.mark.parametrize("layout, to", [("flax", "compvis"), ("safetensors", "diffusers"), ("fp16", "native")])
def test_report_of_weights(layout, to, tmp_path, monkeypatch, capsys):
    seen = run_in_this_process(monkeypatch)
    argv = ["--model", "nano", "--layouts", layout, "--to", to, "--repeat", "1", "--folder", str(tmp_path)]
    report = benchmark_weights.main([*argv, "--json", str(tmp_path / "report.json")])
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"], "nothing else may be left"
    assert seen == ["make", "read_plainly", "read_as_peer", "load", "load", "unlike_drawn", "convert", "unlike_source"]
    loaded, converted = report["results"]
    assert loaded["tensors"] == converted["tensors"] == "identical"
    assert min(loaded["bytes"], converted["bytes"]) > loaded["params_bytes"]
    assert all(seconds > 0 for result in (loaded, converted) for seconds in result["seconds"].values())
    printed = capsys.readouterr().out
    assert f"| {layout} | {loaded['bytes'] / 1e6:.0f} |" in printed and f"| {layout} -> {to} |" in printed


def test_a_difference_ends_the_program_with_a_failure(tmp_path, monkeypatch, capsys):
    run_in_this_process(monkeypatch, unlike_drawn={"unlike": ["vae/conv_in/bias"]})
    with pytest.raises(SystemExit, match="not what they should be: native") as ended:
        benchmark_weights.main(["--model", "nano", "--layouts", "native", "--to", "--repeat", "1"])
    assert isinstance(ended.value.code, str), "Python makes status 1 of a text"
    assert "1 differ (vae/conv_in/bias)" in capsys.readouterr().out


def test_a_process_of_its_own(tmp_path):
    (tmp_path / "a").write_bytes(bytes(200 * benchmark.MIB))
    before = benchmark.peaks()["process_peak"]
    result = benchmark_weights.in_process(benchmark_weights.read_plainly, [str(tmp_path / "a")])
    assert result["seconds"] > 0 and result["peak"] > 200 * benchmark.MIB
    assert benchmark.peaks()["process_peak"] < before + 100 * benchmark.MIB


def test_weights_say_what_is_missing_or_fails(monkeypatch):
    with pytest.raises(RequestError, match="status 3: .*no luck"):
        benchmark_weights.run(
            [benchmark.sys.executable, "-c", "import sys; print('no luck', file=sys.stderr); exit(3)"]
        )
    monkeypatch.setattr(benchmark_weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match="ckpt and bin: torch is needed and not installed"):
        benchmark_weights.main([])
