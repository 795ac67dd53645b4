"""A training run in a folder: from a configuration to parameters, through interruptions of any kind.

The folder of a run holds::

    config.json          what it was started with; it is not resumed with anything else
    checkpoints/         weights.checkpoint
    metrics.jsonl        a line every ``log_every`` steps, and one for each skipped step
    previews/            pictures
    data/                rendered scenes, encoded pictures
    weights.safetensors  the averaged parameters, once it is finished; of "diffusion" a model that sd_jax.load opens

Starting the same configuration in the same folder again goes on from the newest checkpoint, with the very numbers an
undisturbed run would have had: every draw and every batch is a function of the seed and the step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sd_jax import images as im
from sd_jax.tokenizer import Tokenizer
from sd_jax.train.config import Recipe, TrainConfig, differences
from sd_jax.train.data import Interrupted, never, replace_text
from sd_jax.train.state import TrainState, init_state, learning_rate, make_optimizer, train_step
from sd_jax.train.tasks import Task, make_task
from sd_jax.train.trainable import merge, split
from sd_jax.types import Params, RequestError
from sd_jax.weights import checkpoint
from sd_jax.weights.convert import write_native
from sd_jax.weights.safetensors_file import open_safetensors, write_safetensors
from sd_jax.weights.source import NATIVE, open_source

INTERRUPTED = 75  # exit status (EX_TEMPFAIL): run the same command again
WEIGHTS = "weights.safetensors"
PREVIEW_COLUMNS = 8

Log = Callable[[str], None]


class TrainingError(RuntimeError):
    """Training cannot go on, and not because of the request."""


def run(config: TrainConfig | Recipe, workdir: str | Path, *, log: Log | None = None) -> int:
    """Train to the end, or until SIGTERM or SIGINT -> exit status, 0 or INTERRUPTED.

    Interrupted, it saves the step it is at; the same call goes on from there. ``log`` is told of progress, a line at a
    time. Raises RequestError (exit status 2) and TrainingError or CheckpointError (1).
    """
    from sd_jax.train.recipe import run_recipe  # which is made of runs

    with signals() as stop:
        try:
            if isinstance(config, Recipe):
                run_recipe(config, workdir, stop=stop, log=log)
            else:
                train(config, workdir, stop=stop, log=log)
        except Interrupted:
            return INTERRUPTED
    return 0


def train(
    config: TrainConfig,
    workdir: str | Path,
    *,
    start: Mapping[str, Params] | None = None,
    data_dir: str | Path | None = None,
    devices: Sequence[jax.Device] | None = None,
    stop: Callable[[], bool] = never,
    log: Log | None = None,
) -> Params:
    """One run, on all local devices -> its averaged parameters by component, NumPy arrays.

    ``start`` has parameters by component to start from, in place of ``config.init_from``; ``data_dir`` is for data that
    runs share. Where ``stop`` says so the step is saved and Interrupted raised.
    """
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    _check_folder(workdir, config)
    if (workdir / WEIGHTS).exists():
        return load_weights(workdir / WEIGHTS)
    mesh = _mesh(devices or jax.local_devices(), config.batch_size)
    start, tokenizer = read_start(config.init_from) if start is None else (start, None)
    task = make_task(config, data_dir or workdir / "data", start, tokenizer, stop=stop, log=log)
    trainable, frozen = split(task.params, config.trainable)
    # Only now that nothing is left to be refused: the folder is this configuration's from here on.
    replace_text(workdir / "config.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    state = _loop(config, workdir, task, trainable, frozen, mesh, stop, log)
    params = jax.tree.map(np.asarray, {**merge(state.ema, frozen), **task.others})
    _write_weights(workdir / WEIGHTS, config, params, task.tokenizer)
    return params


def _loop(
    config: TrainConfig,
    workdir: Path,
    task: Task,
    trainable: Params,
    frozen: Params,
    mesh: jax.sharding.Mesh,
    stop: Callable[[], bool],
    log: Log | None,
) -> TrainState:
    """-> the state after the last step."""
    everywhere, shared = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    trainable, frozen = jax.device_put((trainable, frozen), everywhere)
    optimizer = make_optimizer(config.optimizer, config.steps)
    init = jax.jit(lambda params: init_state(params, optimizer), out_shardings=everywhere)
    saved = workdir / "checkpoints"
    state, last = _resume(saved, init, trainable, everywhere, log)
    first = last or 0
    recorder = Recorder(workdir, config, task.examples.ids, first, log)

    def step(state, frozen, batch, key):
        def loss(params, batch, key):
            return task.loss(merge(params, frozen), batch, key)

        state, metrics = train_step(state, batch, key, loss=loss, optimizer=optimizer, ema=config.optimizer.ema)
        return state, {**metrics, "bad": state.bad}

    step = jax.jit(
        step, donate_argnums=0, in_shardings=(everywhere, everywhere, shared, everywhere), out_shardings=everywhere
    )
    key = jax.random.key(config.seed)

    def save(done: int) -> None:
        nonlocal last
        recorder.flush()
        if done != last:  # as when interrupted just after saving or resuming
            checkpoint.save(saved, done, state, {"config": dataclasses.asdict(config)}, keep=config.keep)
            last = done

    for done in range(first, config.steps):
        if stop():
            save(done)
            raise Interrupted
        state, metrics = step(state, frozen, jax.device_put(task.examples.batch(done), shared), key)
        recorder.add(done + 1, metrics)
        if (done + 1) % config.save_every == 0 or done + 1 == config.steps:
            save(done + 1)
        if task.preview is not None and config.preview_every and (done + 1) % config.preview_every == 0:
            _write_preview(workdir / "previews" / f"{done + 1:08d}.png", task.preview(merge(state.ema, frozen)))
    return state


# ---- starting and resuming -----------------------------------------------------------------------------------------


def _check_folder(workdir: Path, config: TrainConfig) -> None:
    """Raises RequestError if the folder is another run's."""
    path = workdir / "config.json"
    if path.exists():
        if different := differences(json.loads(path.read_text()), config):
            raise RequestError(
                f"{workdir} holds a run of another configuration: {'; '.join(different)}; "
                "resume it with its own, or use another folder (and init_from, to start from its weights)"
            )
    elif (workdir / "checkpoints").exists():
        raise RequestError(f"{workdir} has checkpoints and no config.json to say of what; use another folder")


def _resume(
    folder: Path, init: Callable, trainable: Params, sharding: NamedSharding, log: Log | None
) -> tuple[TrainState, int | None]:
    """-> (the state to go on from, the step that was restored if one was)."""
    if checkpoint.latest(folder) is None:
        if folder.exists() and any(folder.iterdir()):
            warnings.warn(f"no checkpoint in {folder} was ever finished; starting at step 0", stacklevel=2)
        return init(trainable), None
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), jax.eval_shape(init, trainable)
    )
    state, step, _ = checkpoint.restore(folder, abstract)
    if log is not None:
        log(f"resuming at step {step}")
    return state, step


def read_start(init_from: str | None) -> tuple[Mapping[str, Params], Tokenizer | None]:
    """Parameters by component, and the tokenizer that goes with them; None is that of the scenes."""
    if init_from is None:
        return {}, None
    if (file := Path(init_from) / WEIGHTS).exists():
        if open_safetensors(file)[1].get("format") != NATIVE:
            return load_weights(file), None
        init_from = str(file)
    elif (Path(init_from) / "config.json").exists() and (Path(init_from) / "checkpoints").exists():
        raise RequestError(f"the run in {init_from} is not finished; start from it when it has its {WEIGHTS}")
    source = open_source(init_from)
    for note in source.report.notes:
        warnings.warn(note, stacklevel=2)
    return source.params("float32"), source.tokenizer


def load_weights(path: Path) -> Params:
    """What a finished run has left, any part of a model: nested parameters, NumPy arrays."""
    tensors, _ = open_safetensors(path)
    return flax.traverse_util.unflatten_dict({name: np.array(t.read()) for name, t in tensors.items()}, sep="/")


def _write_weights(path: Path, config: TrainConfig, params: Params, tokenizer: Tokenizer | None) -> None:
    if tokenizer is not None:
        write_native(path, config.model, params, tokenizer, overwrite=True)
        return
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    entries = [(name, array.shape, array.dtype, lambda array=array: array) for name, array in flat.items()]
    write_safetensors(path, entries, {"format": "sd_jax run"}, overwrite=True)


def _mesh(devices: Sequence[jax.Device], batch_size: int) -> jax.sharding.Mesh:
    count = len(devices)
    if batch_size % count:
        near = max(batch_size // count, 1) * count
        raise RequestError(f"batch_size {batch_size} cannot be shared by {count} devices; use {near} or {near + count}")
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices)


# ---- while it runs -------------------------------------------------------------------------------------------------


class Recorder:
    """Writes metrics, reports progress, and stops a run whose loss stays NaN.

    It looks at a step's metrics when the next step is on its way, so that the device never waits for it.
    """

    def __init__(
        self, workdir: Path, config: TrainConfig, ids: Callable[[int], np.ndarray], first: int, log: Log | None
    ):
        self._config, self._ids, self._log = config, ids, log
        self._rate = learning_rate(config.optimizer, config.steps)
        self._path = workdir / "metrics.jsonl"
        self._pending: tuple[int, Any] | None = None
        self._since = (first, time.monotonic())
        if self._path.exists():  # steps that were done after the checkpoint will be done again
            lines = self._path.read_text().split("\n")[:-1]
            replace_text(self._path, "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= first))

    def add(self, step: int, metrics: Any) -> None:
        """``step`` counts from 1; ``metrics`` are its own, maybe still being computed."""
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Look at the step that is pending. Raises TrainingError after too many skipped ones."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        bad = int(values.pop("bad"))
        if bad:
            self._write({"step": step, "skipped": self._ids(step - 1).tolist()})
            if bad > self._config.max_bad:
                raise TrainingError(
                    f"the loss was not finite for {bad} steps in a row, up to step {step} of examples "
                    f"{self._ids(step - 1).tolist()}; start anew from earlier weights with a lower learning rate, or "
                    "without these examples"
                )
        elif step % self._config.log_every == 0 or step == self._config.steps:
            self._report(step, values)

    def _report(self, step: int, values: dict[str, float]) -> None:
        config, now = self._config, time.monotonic()
        rate = (step - self._since[0]) / max(now - self._since[1], 1e-9)
        self._since = (step, now)
        images = rate * config.batch_size * config.repeats
        values |= {"learning_rate": float(self._rate(step - 1)), "images_per_second": round(images, 2)}
        self._write({"step": step, **{name: v if math.isfinite(v) else None for name, v in values.items()}})
        if self._log is not None:
            left = datetime.timedelta(seconds=round((config.steps - step) / rate))
            self._log(
                f"{config.task} {step}/{config.steps}  loss {values['loss']:.4f}  {images:.1f} images/s  {left} left"
            )

    def _write(self, line: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def _write_preview(path: Path, pictures: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    im.publish(path, im.encode_png(im.grid(pictures, PREVIEW_COLUMNS)))  # one that is there already is the same


@contextlib.contextmanager
def signals() -> Iterator[Callable[[], bool]]:
    """A function that tells whether SIGTERM or SIGINT has come; the second one does what it always does."""
    if threading.current_thread() is not threading.main_thread():  # the only one that may have handlers
        yield never
        return
    came = []

    def restore() -> None:
        for number, handler in usual.items():
            signal.signal(number, handler)

    def handle(number: int, frame: Any) -> None:
        came.append(number)
        restore()

    usual = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(came)
    finally:
        restore()
