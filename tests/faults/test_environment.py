"""Faults of the machine, F55, F57, F59: compile caches, missing accelerators, odd environments."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from sd_jax import cli
from tests.micro import micro_file

ROOT = Path(__file__).parents[2]

# One process for what takes a fresh one: the command four times, its compiled programs lost in between.
SCRIPT = """
import contextlib, hashlib, io, json, os, pathlib, sys
import jax
from jax.experimental.compilation_cache import compilation_cache
from sd_jax import cli

cache = cli._cache_folder() / "compiled"
report = {"cache": str(cache)}

def make(name):
    jax.clear_caches()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = cli.main(["txt2img", sys.argv[2], "--model", sys.argv[1], "--steps=3", "--out", sys.argv[3]])
    path = out.getvalue().strip()
    entries = sorted(cache.glob("*text_to_image*-cache")) if cache.is_dir() else []
    pixels = path and hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
    report[name] = {"status": status, "path": path, "err": err.getvalue(), "entries": len(entries), "pixels": pixels}

cache.write_text("a file where the folder should be")
make("in the way")
cache.unlink()
compilation_cache.reset_cache()
make("empty")
for file in cache.glob("*-cache"):
    file.chmod(0o400)
make("filled")
for number, file in enumerate(sorted(cache.glob("*-cache"))):
    data = file.read_bytes()
    file.chmod(0o600)
    file.write_bytes([b"", b"garbage", data[: len(data) // 2], data[:-40] + bytes(40)][number % 4])
make("garbage")
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """LC_ALL=C, nothing but a cache folder to write to, and spaces and letters of other scripts in every path."""
    folder = tmp_path_factory.mktemp("a b") / "größe 大きさ"
    folder.mkdir()
    (folder / "mödel 1.safetensors").symlink_to(micro_file())
    keep = {name: value for name, value in os.environ.items() if name in ("PATH", "LD_LIBRARY_PATH", "JAX_PLATFORMS")}
    env = keep | {
        "LC_ALL": "C",
        "HOME": "/proc/no home",
        "XDG_CACHE_HOME": str(folder / "cäche"),
        "PYTHONPATH": str(ROOT),
    }
    env["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    argv = ["mödel 1.safetensors", "ein größerer Würfel \N{ROCKET}", "aus gabe/ö"]
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, *argv], cwd=folder, env=env, capture_output=True, text=True, encoding="utf-8"
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1]) | {"folder": folder}


def test_f59_odd_names_and_locale(report):
    assert report["cache"] == str(report["folder"] / "cäche" / "sd_jax" / "compiled")
    written = sorted((report["folder"] / "aus gabe" / "ö").iterdir())
    assert [path.name for path in written] == [f"{i:05d}-0.png" for i in range(4)]
    assert report["empty"]["path"] == "aus gabe/ö/00001-0.png"
    assert "mödel 1.safetensors in float32 on 1 cpu device, from seed 0" in report["empty"]["err"]


def test_f55_a_cache_that_cannot_be_used_changes_nothing(report):
    runs = [report[name] for name in ("in the way", "empty", "filled", "garbage")]
    assert [run["status"] for run in runs] == [0] * 4
    assert len({run["pixels"] for run in runs}) == 1


def test_f55_programs_are_kept_between_runs(report):
    assert report["in the way"]["entries"] == 0
    assert report["empty"]["entries"] == report["filled"]["entries"] == 1
    assert "Error reading" not in report["filled"]["err"]


def test_f55_damage_is_said(report):
    assert "warning: Error reading persistent compilation cache entry" in report["garbage"]["err"]


@pytest.mark.parametrize("home", [None, "/proc/nothing", "file"])
def test_f59_no_home_to_write_to(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("not a folder")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if home is None:
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does for a user without an entry
    else:
        monkeypatch.setenv("HOME", str(tmp_path / home) if home == "file" else home)
    assert cli._cache_folder() is None
    assert cli._first_time("anything") and cli._first_time("anything")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_f59_the_notes_of_a_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "ä b"))
    assert cli._first_time("anything") and not cli._first_time("anything") and cli._first_time("another")
    assert cli._cache_folder() == tmp_path / "ä b" / "sd_jax"


@pytest.mark.parametrize("device", ["gpu", "tpu"])
def test_f57_an_accelerator_that_is_not_there(device, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_cache_folder", lambda: None)
    if jax.default_backend() == device:
        pytest.skip(f"there is a {device}")
    argv = ["txt2img", "a cone", f"--model={micro_file()}", f"--device={device}", f"--out={tmp_path}"]
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith(f"error: --device {device}: JAX finds no {device} here, only a ")
    assert err.count("\n") == 1


def test_f57_a_platform_that_the_environment_asks_for(tmp_path):
    env = os.environ | {"JAX_PLATFORMS": "tpu", "CUDA_VISIBLE_DEVICES": ""}
    argv = [sys.executable, "-m", "sd_jax", "txt2img", "a cone", f"--model={micro_file()}", "--out", str(tmp_path)]
    result = subprocess.run(argv, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 2 and not result.stdout
    line = result.stderr.splitlines()[-1]
    assert line.startswith("error: JAX cannot start its device (") and "tpu" in line
    assert line.endswith("); JAX_PLATFORMS is 'tpu', unset it for a CPU")
    assert "Traceback" not in result.stderr
