"""The benchmark: what it reports of a toy model. The numbers themselves are the machine's."""

import json
import subprocess

import jax
import numpy as np
import pytest

from sd_jax.config import NANO
from sd_jax.tokenizer import Tokenizer
from sd_jax.types import RequestError
from sd_jax.weights.convert import write_native
from sd_jax.weights.tables import parameter_shapes
from tools import benchmark


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
