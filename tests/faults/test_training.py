"""Faults F41 to F45: what can go wrong while a model is trained. The loop is the real one, the task a toy."""

import dataclasses
import functools
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd_jax.train import loop
from sd_jax.train.data import Examples, Interrupted
from sd_jax.train.state import init_state, make_optimizer
from sd_jax.types import RequestError
from sd_jax.weights import checkpoint
from tests import toy_training


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setattr(loop, "make_task", toy_training.make_task)


def curve(workdir):
    """The recorded metrics but for the speed."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def train(config, workdir, devices=1, **options):
    return loop.train(config, workdir, devices=jax.devices()[:devices], **options)


def at_step(step, act):
    """A ``stop`` that is asked before each step and acts before this one."""
    asked = iter(range(10**6))
    return lambda: next(asked) == step and act()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_f41_a_signal_saves_the_step_and_the_rest_is_as_if_it_never_came(tmp_path, name):
    config = toy_training.config(batch_size=8)
    assert loop.run(config, tmp_path / "calm") == 0

    def log(line):
        if " 3/7" in line:
            os.kill(os.getpid(), getattr(signal, name))

    before = signal.getsignal(getattr(signal, name))
    assert loop.run(config, tmp_path / "cut", log=log) == 75
    assert signal.getsignal(getattr(signal, name)) == before
    assert checkpoint.latest(tmp_path / "cut" / "checkpoints") == 4  # 3 is looked at while 4 is computed
    assert not (tmp_path / "cut" / loop.WEIGHTS).exists()

    assert loop.run(config, tmp_path / "cut") == 0
    assert curve(tmp_path / "cut") == curve(tmp_path / "calm")
    weights = [loop.load_weights(tmp_path / run / loop.WEIGHTS) for run in ("calm", "cut")]
    jax.tree.map(np.testing.assert_array_equal, *weights)


def test_f41_interrupted_again_before_the_first_step(tmp_path):
    config = toy_training.config(steps=5)
    for _ in range(2):  # the second time the step to save is there already
        with pytest.raises(Interrupted):
            train(config, tmp_path, stop=at_step(0, lambda: True))
    assert checkpoint.steps(tmp_path / "checkpoints") == [0]


def test_f41_killed_without_warning(tmp_path):
    """Steps after the last checkpoint are done again, and recorded once."""
    config = toy_training.config()
    train(config, tmp_path / "calm")

    def kill():
        raise MemoryError

    with pytest.raises(MemoryError):
        train(config, tmp_path / "cut", stop=at_step(6, kill))
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # in the middle of a line
    assert checkpoint.latest(tmp_path / "cut" / "checkpoints") == 4
    train(config, tmp_path / "cut")
    assert curve(tmp_path / "cut") == curve(tmp_path / "calm")


def test_f41_killed_in_its_first_save(tmp_path):
    """There is nothing to resume, which is said."""
    config = toy_training.config(steps=2)
    train(config, tmp_path / "calm")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "cut", stop=at_step(1, lambda: True))
    (tmp_path / "cut" / "checkpoints" / "00000001" / "SHA256SUMS").unlink()
    with pytest.warns(UserWarning, match="no checkpoint in .* was ever finished; starting at step 0"):
        train(config, tmp_path / "cut")
    assert curve(tmp_path / "cut") == curve(tmp_path / "calm")


@pytest.mark.parametrize("after", [0, 4])
def test_f41_interrupted_where_the_newest_checkpoint_is_damaged(tmp_path, after):
    """Resumed at step 4 of 8: just then, and where the step that was damaged is reached again."""
    config = toy_training.config(steps=10)
    train(config, tmp_path / "calm")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "cut", stop=at_step(9, lambda: True))
    saved = tmp_path / "cut" / "checkpoints"
    shutil.rmtree(saved / "00000009")
    damaged = max((saved / "00000008" / "state").rglob("*"), key=lambda file: file.is_file() and file.stat().st_size)
    damaged.write_bytes(bytes(damaged.stat().st_size))
    with pytest.warns(UserWarning, match="restoring step 4"), pytest.raises(Interrupted):
        train(config, tmp_path / "cut", stop=at_step(after, lambda: True))
    assert checkpoint.problems(saved, 4 + after) == []
    shutil.rmtree(saved / f"{8 if after == 0 else 4:08d}")
    train(config, tmp_path / "cut")
    assert curve(tmp_path / "cut") == curve(tmp_path / "calm")


def test_f42_resumed_on_another_number_of_devices(tmp_path):
    config = toy_training.config()
    with pytest.raises(Interrupted):
        train(config, tmp_path / "8", devices=8, stop=at_step(3, lambda: True))
    shutil.copytree(tmp_path / "8", tmp_path / "1")
    train(config, tmp_path / "8", devices=8)
    train(config, tmp_path / "1", devices=1)
    for one, eight in zip(curve(tmp_path / "1"), curve(tmp_path / "8"), strict=True):
        assert abs(one["loss"] - eight["loss"]) < 1e-6 * max(1, eight["loss"])  # sums in another order
    with pytest.raises(RequestError, match="batch_size 12 cannot be shared by 8 devices; use 8 or 16"):
        train(toy_training.config(batch_size=12), tmp_path / "12", devices=8)


def test_f42_the_devices_share_the_batch(tmp_path, monkeypatch):
    """A mesh program can run in full on each device without a word: the loss is told how much of the batch it has."""
    seen = []

    def make_task(config, *args, **kwargs):
        task = toy_training.make_task(config, *args, **kwargs)

        def loss(params, batch, key):
            jax.debug.inspect_array_sharding(
                batch["x"], callback=lambda sharding: seen.append(sharding.shard_shape(batch["x"].shape))
            )
            return task.loss(params, batch, key)

        return dataclasses.replace(task, loss=loss)

    monkeypatch.setattr(loop, "make_task", make_task)
    train(toy_training.config(steps=1, batch_size=16), tmp_path, devices=8)
    assert set(seen) == {(2, 3)}


def test_f43_resumed_in_the_middle_of_an_epoch():
    """No state is kept, so none can be lost: 20 examples in batches of 8, each once an epoch, whenever asked."""
    examples = Examples({"tokens": np.arange(20)[:, None] + 100}, 8, seed=1, dropout=0.5, empty=np.array([7]))
    order = np.concatenate([examples.ids(step) for step in range(5)])
    assert sorted(order[:20]) == sorted(order[20:]) == list(range(20)) and list(order[:20]) != list(order[20:])
    fresh = Examples(examples.arrays, 8, seed=1, dropout=0.5, empty=np.array([7]))
    np.testing.assert_array_equal(fresh.ids(3), order[24:32])
    batches = [examples.batch(step)["tokens"][:, 0] for step in range(5)]
    np.testing.assert_array_equal(fresh.batch(3)["tokens"][:, 0], batches[3])
    dropped = np.concatenate(batches) == 7
    assert 0.2 < dropped.mean() < 0.8
    np.testing.assert_array_equal(np.concatenate(batches)[~dropped], order[~dropped] + 100)


def test_f44_a_nan_is_skipped_and_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_task", functools.partial(toy_training.make_task, broken=[7]))
    weights = train(toy_training.config(steps=10), tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(weights))
    skipped = [line for line in curve(tmp_path) if "skipped" in line]
    assert len(skipped) == 4 and all(7 in line["skipped"] for line in skipped)  # 80 examples are 4 epochs
    assert len(curve(tmp_path)) == 10


def test_f44_too_many_in_a_row_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_task", functools.partial(toy_training.make_task, broken=range(20)))
    with pytest.raises(loop.TrainingError, match=r"3 steps in a row, up to step 3 of examples \[\d+, ") as error:
        train(toy_training.config(), tmp_path)
    ids = toy_training.make_task(toy_training.config(), None, {}).examples.ids(2)
    assert str(ids.tolist()) in str(error.value)
    assert not (tmp_path / loop.WEIGHTS).exists()


@pytest.mark.parametrize("lost", ["ema", "opt_state"])
def test_f45_a_checkpoint_without_average_or_optimizer_is_refused(tmp_path, lost):
    config = toy_training.config()
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = init_state({"net": {"w": jnp.zeros(3), "b": jnp.zeros(())}}, optimizer)
    with pytest.raises(Interrupted):
        train(config, tmp_path, stop=at_step(0, lambda: True))
    checkpoint.save(tmp_path / "checkpoints", 2, dataclasses.replace(state, **{lost: None}))
    with pytest.raises(RequestError, match=f"is not the state of this run: missing there {lost}/"):
        train(config, tmp_path)


def test_f45_another_configuration_does_not_resume(tmp_path):
    config = toy_training.config()
    with pytest.raises(Interrupted):
        train(config, tmp_path, stop=at_step(2, lambda: True))
    other = dataclasses.replace(config, seed=3, optimizer=dataclasses.replace(config.optimizer, b2=0.99), log_every=7)
    with pytest.raises(RequestError, match="optimizer.b2 was 0.999 and is 0.99; seed was 0 and is 3; resume it"):
        train(other, tmp_path)
    train(dataclasses.replace(config, log_every=7, keep=1, save_every=100), tmp_path)  # changes nothing that is learnt
    (tmp_path / "config.json").unlink()
    with pytest.raises(RequestError, match="has checkpoints and no config.json"):
        train(config, tmp_path)


def test_f45_starting_from_weights_is_not_resuming(tmp_path):
    config = toy_training.config()
    with pytest.raises(Interrupted):
        train(config, tmp_path / "a", stop=at_step(5, lambda: True))
    start = toy_training.config(init_from=str(tmp_path / "a"), steps=2)
    with pytest.raises(RequestError, match="the run in .*a is not finished"):
        train(start, tmp_path / "b0")
    first = train(config, tmp_path / "a")
    train(start, tmp_path / "b")
    begun = curve(tmp_path / "b")
    assert [line["step"] for line in begun] == [1, 2] and begun[0]["learning_rate"] == 0  # a new schedule
    assert begun[0]["loss"] < 0.9 * curve(tmp_path / "a")[0]["loss"]  # from weights that were learnt
    jax.tree.map(np.testing.assert_array_equal, loop.load_weights(tmp_path / "a" / loop.WEIGHTS), first)
