"""Training state on disk: Orbax writes the arrays, and a list of sha256 beside them tells if they are still the same
(Orbax itself restores a flipped bit without a word).

A run's folder holds one folder a step::

    00001000/state/...        Orbax
    00001000/record.json      step, the extra of the caller, shape and dtype of every array
    00001000/SHA256SUMS       of all the files above, written last: a step without it was never finished

so a kill at any moment costs at most the step being saved, and ``sha256sum -c SHA256SUMS`` checks a step without
sd_jax. With several processes all of them call these functions, on a folder that they share.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from sd_jax.types import RequestError
from sd_jax.weights import sums

_RECORD = "record.json"


class CheckpointError(RuntimeError):
    """A step could not be saved (no room, say). What was saved before is untouched."""


def save(folder: str | Path, step: int, state: Any, extra: Mapping[str, Any] | None = None, *, keep: int = 3) -> Path:
    """Save ``state`` (a pytree of arrays) and ``extra`` (JSON: data position, config, ...) as ``step`` -> its folder.

    Returns when everything is on disk, and all but the newest ``keep`` of the steps up to this one are removed. Raises
    RequestError if the step is there already, intact (a broken or unfinished one is replaced), and CheckpointError if
    the writing fails, with nothing removed but its own leftovers.
    """
    from orbax.checkpoint import v1 as ocp  # slow to import

    folder, primary = _local(folder), jax.process_index() == 0
    path = folder / f"{step:08d}"
    record = {"step": step, "leaves": _describe(state), "extra": json.loads(json.dumps(extra or {}))}
    if path.exists():
        if not problems(folder, step):
            raise RequestError(f"step {step} is already saved in {folder}; resume from it, or use another folder")
        if primary:
            shutil.rmtree(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _without_orbax_log():
            ocp.save(path, state)
        if primary:
            _seal(path, record)
    except (OSError, ValueError, RuntimeError) as error:  # tensorstore reports a full disk as a ValueError
        for leftover in (path, *_leftovers(folder)) if primary else ():
            shutil.rmtree(leftover, ignore_errors=True)
        raise CheckpointError(_failure(folder, step, state, error)) from error
    if primary:
        _prune(folder, step, keep)
    return path


def restore(folder: str | Path, abstract_state: Any, step: int | None = None) -> tuple[Any, int, dict[str, Any]]:
    """The newest intact step in ``folder``, or exactly ``step`` -> (state, step, extra).

    ``abstract_state`` is the state's tree of ``jax.ShapeDtypeStruct`` (from ``jax.eval_shape``) with the shardings
    the arrays shall have, whatever devices they were saved from; without one an array goes to the first device.

    Every file is checked against its sha256 first. Whatever had to be skipped for the newest intact step is said in one
    UserWarning, with reasons. Raises RequestError if no step is intact, or if the step does not hold exactly the
    arrays of ``abstract_state``: a missing optimizer or EMA is never made up.
    """
    from orbax.checkpoint import v1 as ocp  # slow to import

    folder = _local(folder)
    numbered, skipped = _scan(folder)
    if step is not None:
        numbered, skipped = [step], []
    for number in reversed(numbered):
        wrong = problems(folder, number)
        if not wrong:
            break
        skipped.append(f"step {number} ({_some(wrong)})")
    else:
        found = f": {'; '.join(skipped)}" if skipped else ", it is empty or not there"
        raise RequestError(f"{folder} has no step that can be restored{found}")
    if skipped:
        warnings.warn(f"restoring step {number} of {folder}; skipped: {'; '.join(skipped)}", stacklevel=2)
    path = folder / f"{number:08d}"
    record = json.loads((path / _RECORD).read_text())
    _check_leaves(path, record["leaves"], _describe(abstract_state))
    return ocp.load(path, jax.tree.map(_placed, abstract_state)), number, record["extra"]


def latest(folder: str | Path) -> int | None:
    """The newest step whose saving was finished, or None. Files are not verified: that is ``restore``'s."""
    return max(steps(folder), default=None)


def steps(folder: str | Path) -> list[int]:
    """All steps whose saving was finished, ascending."""
    folder = _local(folder)
    return [step for step in _scan(folder)[0] if (folder / f"{step:08d}" / sums.NAME).is_file()]


def problems(folder: str | Path, step: int) -> list[str]:
    """What is wrong with the files of a step, one sentence each; [] if it is exactly as it was written."""
    path = _local(folder) / f"{step:08d}"
    if not path.is_dir():
        return ["it is not there"]
    if not (path / sums.NAME).is_file():
        return [f"no {sums.NAME}: its saving or its copying was not finished"]
    text = (path / sums.NAME).read_bytes().decode("utf-8", "replace")
    expected = sums.from_text(text)
    if text != sums.to_text(expected):
        return [f"{sums.NAME} itself was changed"]
    names = sorted(expected.keys() - {_RECORD}) + [_RECORD]
    actual = sums.digests(path, names)
    wrong = [f"{name} is missing" for name in names if actual[name] is None]
    wrong += [f"{name} was changed" for name in names if actual[name] not in (None, expected.get(name))]
    if not wrong:
        record = json.loads((path / _RECORD).read_text())
        if record["step"] != step:
            wrong.append(f"it is a copy of step {record['step']}")
        if record["files"] != len(expected):
            wrong.append(f"{sums.NAME} lists {len(expected)} of {record['files']} files")
    return wrong


# ---- the parts of saving -------------------------------------------------------------------------


def _seal(path: Path, record: dict[str, Any]) -> None:
    """Write the record, and then the list that makes the step a finished one."""
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    names.append(_RECORD)
    sums.write(path / _RECORD, json.dumps({**record, "files": len(names)}))
    digests = sums.digests(path, names)
    if unread := [name for name in names if digests[name] is None]:
        raise OSError(f"{unread[0]} cannot be read back")
    sums.write(path / sums.NAME, sums.to_text(digests))


def _prune(folder: Path, step: int, keep: int) -> None:
    """Remove what killed saves left, and the oldest steps up to ``step``: a later one does not count as kept, as the
    run may have gone back because it is broken."""
    old = [saved for saved in steps(folder) if saved <= step][: -max(keep, 1)]
    for path in [folder / f"{number:08d}" for number in old] + _leftovers(folder):
        # First: a removal that is interrupted leaves no step that looks whole.
        (path / sums.NAME).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)


def _leftovers(folder: Path) -> list[Path]:
    """What Orbax leaves behind when it is killed."""
    return list(folder.glob("[0-9]*.orbax-checkpoint-tmp*"))


def _failure(folder: Path, step: int, state: Any, error: Exception) -> str:
    size = sum(getattr(leaf, "nbytes", 0) for leaf in jax.tree.leaves(state)) / 2**20
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    room = f"{shutil.disk_usage(existing).free / 2**20:,.0f} MiB free, {size:,.0f} MiB to save before compression"
    last = latest(folder)
    kept = "no earlier step is there" if last is None else f"step {last} is still there to resume from"
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return f"step {step} could not be saved in {folder} ({room}): {reason}; {kept}"


@contextlib.contextmanager
def _without_orbax_log() -> Iterator[None]:
    """Orbax logs one failed write as five tracebacks before it raises."""

    def drop(record: logging.LogRecord) -> bool:
        return False

    logger = logging.getLogger("absl")
    logger.addFilter(drop)
    try:
        yield
    finally:
        logger.removeFilter(drop)


# ---- the parts of restoring ----------------------------------------------------------------------


def _scan(folder: Path) -> tuple[list[int], list[str]]:
    """-> (the steps there are, ascending, finished or not; everything else in the folder, with what it is)."""
    numbered, strays = [], []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if re.fullmatch(r"\d{8,}", path.name) and path.name == f"{int(path.name):08d}" and path.is_dir():
            numbered.append(int(path.name))
        elif ".orbax-checkpoint-tmp" in path.name:
            strays.append(f"{path.name} (a save that was killed)")
        else:
            strays.append(f"{path.name} (not named like a step, eight digits)")
    return sorted(numbered), strays


def _check_leaves(path: Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    differences = []
    if missing := sorted(wanted.keys() - saved.keys()):
        differences.append(f"missing there {_some(missing)}")
    if surplus := sorted(saved.keys() - wanted.keys()):
        differences.append(f"only there {_some(surplus)}")
    if changed := [f"{n} {saved[n]} not {wanted[n]}" for n in sorted(saved.keys() & wanted) if saved[n] != wanted[n]]:
        differences.append(f"different there {_some(changed)}")
    if differences:
        advice = "resume with the configuration it was saved with, or start a new run from weights"
        raise RequestError(f"{path} is not the state of this run: {'; '.join(differences)}; {advice}")


def _describe(state: Any) -> dict[str, str]:
    """Path of each leaf -> its dtype and shape, "float32[3,4]"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    return {name: f"{x.dtype}[{','.join(map(str, x.shape))}]" for name, (_, x) in zip(names, leaves, strict=True)}


def _placed(leaf: Any) -> Any:
    """An abstract array without a sharding goes to the first device (Orbax would want the saving run's devices)."""
    if getattr(leaf, "sharding", None) is not None:
        return leaf
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=first)


def _some(items: list[str], limit: int = 6) -> str:
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def _local(folder: str | Path) -> Path:
    if "://" in str(folder):
        raise RequestError(f"{folder} is an address; checkpoints need a folder, such as a mounted bucket")
    return Path(folder).absolute()
