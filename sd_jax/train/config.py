"""What is to be trained and how, as frozen dataclasses; their files, and changes to them by dotted names.

A configuration file is Python with a function ``get_config()`` that returns a TrainConfig (one run) or a Recipe (the
runs that make a whole model).
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import runpy
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sd_jax.config import SDConfig
from sd_jax.train.losses import NoiseLoss
from sd_jax.train.state import DECAYS, OptimizerConfig
from sd_jax.types import RequestError

TASKS = ("vae", "text", "diffusion")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Captioned scenes to train on; see ``train.scenes``."""

    scenes: int = 50_000
    seed: int = 0
    split: str = "train"
    workers: int = 1  # processes that render; more than one needs a main module that can be imported


@dataclasses.dataclass(frozen=True)
class VAELoss:
    """Weights of the parts of ``losses.vae_loss``."""

    kl: float = 3e-4
    mse: float = 4.0
    edges: float = 0.0


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One run. Everything that decides what it will have learnt is here; where it is kept is not."""

    task: str = "diffusion"  # one of TASKS, see train.tasks
    model: SDConfig = SDConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    steps: int = 10_000
    batch_size: int = 32
    seed: int = 0
    dtype: str = "float32"  # of the computation; parameters are float32
    # A model (as sd_jax.load takes it) or the folder of another run, to take parameters from at the very start. This is
    # not how a run is resumed: that happens by itself, in the folder of the run.
    init_from: str | None = None
    trainable: tuple[str, ...] = ("",)  # regular expressions for the beginning of parameters' paths
    vae_loss: VAELoss = VAELoss()
    noise_loss: NoiseLoss = NoiseLoss()
    repeats: int = 1  # draws of timestep and noise for each caption that the text tower reads
    caption_dropout: float = 0.1  # share of captions that become the empty one, which guidance needs
    log_every: int = 50
    save_every: int = 1000
    keep: int = 3  # checkpoints
    preview_every: int = 0  # steps between preview pictures; 0 for none
    max_bad: int = 10  # steps in a row that may be skipped because their loss is not finite

    def __post_init__(self):
        _require_one("task", self.task, TASKS)
        _require_one("optimizer.decay", self.optimizer.decay, DECAYS)
        _require_one("dtype", self.dtype, ("float32", "bfloat16"))
        for name in ("steps", "batch_size", "repeats", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise RequestError(f"{name} is {getattr(self, name)}; give 1 or more")
        if not 0 <= self.caption_dropout <= 1:
            raise RequestError(f"caption_dropout is {self.caption_dropout}; give a share from 0 to 1")


# What a run may be resumed with a different value of: none of it changes what is learnt.
FREE = (
    "model.noise.sampler",
    "model.noise.spacing",
    "model.noise.guidance",
    "data.workers",
    "log_every",
    "save_every",
    "keep",
    "preview_every",
    "max_bad",
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A whole model: three runs, each from where the ones before ended (``train.recipe``).

    ``model``, ``data`` and ``init_from`` are those of all runs, whose own are not read. The last one leaves the whole
    model.
    """

    model: SDConfig
    data: DataConfig
    vae: TrainConfig
    text: TrainConfig
    diffusion: TrainConfig
    # A model to go on from instead of nothing. "text" is then left out: its text tower knows the order of words.
    init_from: str | None = None


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig | Recipe:
    """The configuration of a file, changed by ``overrides`` such as "optimizer.learning_rate=1e-4"."""
    path = Path(path)
    if not path.is_file():
        raise RequestError(f"there is no configuration {path}; give a Python file with get_config()")
    make = runpy.run_path(str(path)).get("get_config")
    config = make() if callable(make) else None
    if not isinstance(config, TrainConfig | Recipe):
        raise RequestError(f"{path} has no get_config() that returns a TrainConfig or a Recipe")
    return override(config, overrides)


def override(config: Any, overrides: Sequence[str]) -> Any:
    """``config`` with "key.path=value" changes, in order. Raises RequestError for a key or value that does not fit."""
    for text in overrides:
        path, equals, value = text.partition("=")
        if not equals:
            raise RequestError(f"{text!r} is not of the form key.path=value")
        keys = path.strip().split(".")
        if isinstance(config, Recipe) and keys[1:2] and keys[1] in ("model", "data", "init_from"):
            raise RequestError(
                f"{keys[0]} takes its {keys[1]} from the recipe; set {'.'.join(keys[1:])} without {keys[0]}"
            )
        config = _set(config, keys, value.strip(), path.strip())
    return config


def _set(config: Any, keys: list[str], text: str, path: str) -> Any:
    hints = typing.get_type_hints(type(config))
    key, *rest = keys
    if key not in hints:
        near = difflib.get_close_matches(key, hints, 1)
        known = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(hints)}"
        raise RequestError(f"{path} is not in the configuration: {type(config).__name__} has no {key!r}; {known}")
    value = getattr(config, key)
    if rest and not dataclasses.is_dataclass(value):
        raise RequestError(f"{path} is not in the configuration: {key} is {value!r} and has no parts")
    if not rest and dataclasses.is_dataclass(value):
        inner = ", ".join(field.name for field in dataclasses.fields(value))
        raise RequestError(f"{path} cannot be set as a whole; set one of its parts: {inner}")
    value = _set(value, rest, text, path) if rest else _parse(hints[key], text, path)
    return dataclasses.replace(config, **{key: value})


def _parse(kind: Any, text: str, path: str) -> Any:
    try:
        value = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        value = text
    fitted = _fit(kind, value, text)
    if fitted is _MISFIT:
        raise RequestError(f"{path} takes {_name(kind)}, and {text!r} is none")
    return fitted


_MISFIT = object()


def _fit(kind: Any, value: Any, text: str) -> Any:
    """``value``, or the ``text`` that it was read from, as a ``kind``; _MISFIT if it is none."""
    if isinstance(kind, types.UnionType):
        fits = (_fit(member, value, text) for member in reversed(typing.get_args(kind)))
        return next((fit for fit in fits if fit is not _MISFIT), _MISFIT)
    if typing.get_origin(kind) is tuple:
        value = tuple(text.split(",")) if isinstance(value, str) else value
        values = value if isinstance(value, tuple | list) else (value,)
        fits = tuple(_fit(typing.get_args(kind)[0], v, str(v)) for v in values)
        return _MISFIT if any(fit is _MISFIT for fit in fits) else fits
    if kind is str:
        return value if isinstance(value, str) else text
    if kind is float and type(value) is int:
        return float(value)
    return value if type(value) is kind else _MISFIT


def _name(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(map(_name, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return f"a tuple, each of it {_name(typing.get_args(kind)[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "none"}
    return names[kind]


def differences(old: dict[str, Any], config: TrainConfig) -> list[str]:
    """In what ``config`` is of another run than ``old``, a ``dataclasses.asdict`` that has been through JSON."""
    was, now = dict(_flat(old)), dict(_flat(dataclasses.asdict(config)))
    changed = (key for key in [*now, *(was.keys() - now.keys())] if was.get(key) != now.get(key) and key not in FREE)
    return [f"{key} was {was.get(key)!r} and is {now.get(key)!r}" for key in changed]


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, list(value) if isinstance(value, tuple) else value


def _require_one(name: str, value: Any, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise RequestError(f"{name} is {value!r}; give one of {', '.join(allowed)}")
