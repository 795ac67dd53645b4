"""Checkpoints, F37-F40: kills, full disks, damage and strays cost at most the step they hit, and are said aloud."""

import os
import random
import resource
import shutil
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sd_jax.types import RequestError
from sd_jax.weights import checkpoint, sums

ROOT = Path(checkpoint.__file__).parents[2]


def make_state(step, size=64):
    params = {"kernel": jnp.full((size, size), float(step)) + jnp.arange(size)}
    return {"params": params, "opt": optax.adam(1e-3).init(params)}


def abstract(size=64):
    return jax.eval_shape(lambda: make_state(0, size))


def restore(folder, size=64):
    """-> (step, the warnings' texts), after checking that the step's own state came back."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state, step, extra = checkpoint.restore(folder, abstract(size))
    np.testing.assert_array_equal(state["params"]["kernel"], make_state(step, size)["params"]["kernel"])
    assert extra == {"position": step}
    return step, [str(warning.message) for warning in caught]


@pytest.fixture
def folder(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, make_state(step), {"position": step})
    return tmp_path


# ---- F37: kill -9 in a save ----------------------------------------------------------------------

SAVE_FOR_EVER = textwrap.dedent(
    """
    import sys
    import jax, jax.numpy as jnp, optax
    from sd_jax.weights import checkpoint, sums

    def make_state(step, size):
        params = {"kernel": jnp.full((size, size), float(step)) + jnp.arange(size)}
        return {"params": params, "opt": optax.adam(1e-3).init(params)}

    folder, step = sys.argv[1], checkpoint.latest(sys.argv[1]) or 0
    while True:
        step += 1
        checkpoint.save(folder, step, make_state(step, 512), {"position": step}, keep=2)
        print(step, flush=True)
    """
)


def test_f37_the_last_saved_step_survives_every_kill(tmp_path):
    chance = random.Random(0)
    interrupted = 0
    for _ in range(4):
        command = [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
            said = int(process.stdout.readline())
            time.sleep(chance.uniform(0, 0.2))
            process.kill()
            said = max([said, *(int(line) for line in process.stdout.read().split())])
        step, warned = restore(tmp_path, size=512)
        assert step in (said, said + 1)  # killed after the list was written, before it could say so
        interrupted += bool(warned)
    assert interrupted, "no kill hit a save: the test has tested nothing"


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("count", [1, 2])
def test_f37_a_save_cut_off_before_its_list_is_not_a_step(folder, monkeypatch, call, count):
    """A kill between Orbax's end and ours, at each system call: the exception passes every handler, as a kill would."""
    calls = []
    real = getattr(os, call)

    def cut(*arguments):
        calls.append(arguments)
        if len(calls) == count:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, call, cut)
        checkpoint.save(folder, 3, make_state(3), {"position": 3})
    step, warned = restore(folder)
    assert step == 2 and "step 3 (no SHA256SUMS" in warned[0]
    checkpoint.save(folder, 3, make_state(3), {"position": 3})
    assert restore(folder) == (3, [])


def test_f37_leftovers_of_kills_are_swept_by_the_next_save(folder):
    shutil.copytree(folder / "00000001", folder / "00000003.orbax-checkpoint-tmp")
    checkpoint.save(folder, 4, make_state(4), {"position": 4})
    assert sorted(os.listdir(folder)) == ["00000001", "00000002", "00000004"]


# ---- F38: full disk ------------------------------------------------------------------------------


def test_f38_a_failed_write_keeps_what_was_there_and_leaves_nothing(folder, caplog):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the system refuses to write on, as on a full disk
    try:
        with pytest.raises(checkpoint.CheckpointError) as caught:
            checkpoint.save(folder, 3, make_noise(), {"position": 3}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(caught.value)
    assert "MiB free" in message and "step 2 is still there" in message and "\n" not in message
    assert "Traceback" not in caplog.text
    assert sorted(os.listdir(folder)) == ["00000001", "00000002"]
    assert restore(folder) == (2, [])
    checkpoint.save(folder, 3, make_state(3), {"position": 3})
    assert restore(folder) == (3, [])


def make_noise():
    """A state that does not compress."""
    return {"kernel": jax.random.normal(jax.random.key(0), (256, 256))}


def test_f38_no_room_for_the_list_either(folder, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sums, "write", full)
    with pytest.raises(checkpoint.CheckpointError, match="No space left on device"):
        checkpoint.save(folder, 3, make_state(3), keep=1)
    assert sorted(os.listdir(folder)) == ["00000001", "00000002"]


def test_f38_what_cannot_be_read_back_was_not_saved(folder, monkeypatch):
    monkeypatch.setattr(sums, "sha256", lambda path: None)
    with pytest.raises(checkpoint.CheckpointError, match="cannot be read back; step 2 is still there"):
        checkpoint.save(folder, 3, make_state(3), keep=1)
    assert sorted(os.listdir(folder)) == ["00000001", "00000002"]


def test_f38_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(checkpoint.CheckpointError, match="no earlier step is there"):
        checkpoint.save(tmp_path / "file" / "run", 1, make_state(1))


# ---- F39: damaged files --------------------------------------------------------------------------


def files_of(path):
    return sorted(file for file in path.rglob("*") if file.is_file())


def test_f39_every_flipped_bit_is_found(folder):
    chance = random.Random(1)
    path = folder / "00000002"
    flips = 0
    for file in files_of(path):
        data = file.read_bytes()
        for _ in range(20 if data else 0):
            flipped = bytearray(data)
            flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            file.write_bytes(flipped)
            assert checkpoint.problems(folder, 2), f"a flip in {file.name} was not found"
            flips += 1
        file.write_bytes(data)
    assert flips >= 150
    assert checkpoint.problems(folder, 2) == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_f39_damage_to_any_file_falls_back_loudly(folder, damage):
    path = folder / "00000002"
    for file in files_of(path):
        data = file.read_bytes()
        if damage == "delete":
            file.unlink()
        elif not data:
            continue
        else:
            file.write_bytes(data[:-1] if damage == "truncate" else bytes([data[0] ^ 1]) + data[1:])
        step, warned = restore(folder)
        assert step == 1 and len(warned) == 1
        assert "restoring step 1" in warned[0] and "skipped: step 2 (" in warned[0]
        assert file.name in warned[0] or file.name == "SHA256SUMS"
        file.write_bytes(data)
    assert restore(folder) == (2, [])


def test_f39_a_list_cut_short_is_found(folder):
    """A list that lost whole lines still agrees with every file that it names."""
    sums = folder / "00000002" / "SHA256SUMS"
    lines = sums.read_text().splitlines(keepends=True)
    for kept in range(len(lines)):
        sums.write_text("".join(lines[:kept]))
        assert checkpoint.problems(folder, 2)
        sums.write_text("".join(lines[len(lines) - kept :]))
        assert checkpoint.problems(folder, 2)


def test_f39_a_step_asked_for_by_number_does_not_fall_back(folder):
    (folder / "00000002" / "record.json").unlink()
    with pytest.raises(RequestError, match=r"step 2 \(record.json is missing\)"):
        checkpoint.restore(folder, abstract(), step=2)


def test_f39_when_nothing_is_whole_all_reasons_are_given(folder):
    (folder / "00000001" / "state" / "_METADATA").unlink()
    (folder / "00000002" / "state" / "manifest.ocdbt").write_bytes(b"")
    with pytest.raises(RequestError) as caught:
        checkpoint.restore(folder, abstract())
    assert "step 2 (state/manifest.ocdbt was changed); step 1 (state/_METADATA is missing)" in str(caught.value)


# ---- F40: strays ---------------------------------------------------------------------------------


def test_f40_strays_are_skipped_with_the_reason(folder):
    (folder / "notes").mkdir()
    (folder / "readme.txt").write_text("mine")
    (folder / "00000009").mkdir()
    shutil.copytree(folder / "00000001", folder / "00000002 (copy)")
    shutil.copytree(folder / "00000001", folder / "00000007")
    shutil.copytree(folder / "00000002", folder / "00000008", ignore=shutil.ignore_patterns("d"))
    shutil.copytree(folder / "00000002", folder / "00000003.orbax-checkpoint-tmp")
    step, warned = restore(folder)
    assert step == 2 and len(warned) == 1
    for reason in [
        "notes (not named like a step",
        "readme.txt (not named like a step",
        "00000002 (copy) (not named like a step",
        "step 9 (no SHA256SUMS: its saving or its copying was not finished)",
        "step 7 (it is a copy of step 1)",
        "is missing",
        "00000003.orbax-checkpoint-tmp (a save that was killed)",
    ]:
        assert reason in warned[0]
    checkpoint.save(folder, 3, make_state(3), {"position": 3}, keep=1)
    for stray in ["notes", "readme.txt", "00000002 (copy)"]:
        assert (folder / stray).exists(), "a save may only remove what is its own"
