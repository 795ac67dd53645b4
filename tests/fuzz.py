"""Real files of weights in each format, and what must hold whenever one of them, or a mutant of it, is opened.

``examine`` opens a ``Mutant`` as its users would and raises AssertionError where anything comes of it but an answer or
an error of ours. ``tests/mutants.py`` makes mutants, ``tests/faults/test_fuzz.py`` examines some hundreds, the same
every time, and ``tools/fuzz_weights.py`` as many as there is time for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import os
import signal
import sys
import tempfile
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.serialization
import flax.traverse_util
import numpy as np
import safetensors.numpy

from sd_jax.config import CLIPConfig, NoiseConfig, SDConfig, UNetConfig, VAEConfig
from sd_jax.tokenizer import Tokenizer
from sd_jax.types import RequestError
from sd_jax.weights import sums
from sd_jax.weights.convert import write_compvis, write_diffusers, write_native
from sd_jax.weights.files import FOLDERS, Request
from sd_jax.weights.info import as_text, inspect
from sd_jax.weights.parts import open_part
from sd_jax.weights.source import open_source
from sd_jax.weights.tables import parameter_shapes
from tests.random_weights import noise

# Every part there is, and 9,000 parameters: a mutant takes the time that its structure takes.
MODEL = SDConfig(
    clip=CLIPConfig(vocab_size=514, width=4, mlp_width=4, layers=1, heads=1),
    unet=UNetConfig(widths=(4,), layers=1, attention=(False,), heads=(1,), context_width=4, groups=2, sample_size=8),
    vae=VAEConfig(widths=(4,), layers=1, groups=2),
    noise=NoiseConfig(sampler="ddim"),
)
TOKENIZER = Tokenizer.from_merges(())
RECORD = {"version": "0.1.0", "source": "x.ckpt", "probe_version": 1, "probe": {"text": [0.5, None], "unet": [1.0]}}

SECONDS = 30  # of CPU for one mutant, under tracemalloc: most take 0.02, and 10 where a large config is traced anew
# Bytes, beside twice the files' size, in which Python's objects may be that a file of nothing but small values is made
# into: the readers' limits (MAX_INSTRUCTIONS, MAX_COMMAS, ...) keep them to this. Mutants of small files take 1 or 2
# MiB, and 15 where JAX traces the networks of v1-4's config.
CONSTANT = 64 << 20


# ---- real files ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Original:
    """A model as it lies on disk: the bytes of its files by name."""

    files: dict[str, bytes]
    main: str  # the one that is opened; "" where it is the folder
    options: dict[str, Any]  # of open_source
    covered: bool  # every byte that matters has a checksum


@functools.cache
def params() -> dict[str, np.ndarray]:
    """Ours, by path."""
    shapes = parameter_shapes(MODEL)
    return {f"{c}/{path}": noise(f"{c}/{path}", shape) for c in shapes for path, shape in shapes[c].items()}


@functools.cache
def original(kind: str) -> Original:
    """One of KINDS, as torch, the safetensors library, flax or we write it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        main = _WRITE[kind](folder) or ""
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    own = {"config": MODEL} if kind in ("ckpt", "safetensors") else {}  # compvis has it in its metadata
    own |= {"tokenizer": TOKENIZER} if kind in ("ckpt", "safetensors", "compvis") else {}
    return Original(files, main, own, kind in ("ckpt", "compvis", "native", "folder"))


def _ckpt(folder: Path) -> str:
    from tests.lightning import save_checkpoint, torch

    state = safetensors.numpy.load(original("compvis").files["a.safetensors"])
    save_checkpoint(folder / "a.ckpt", {name: torch.from_numpy(array.copy()) for name, array in state.items()})
    return "a.ckpt"


def _safetensors(folder: Path) -> str:
    state = safetensors.numpy.load(original("compvis").files["a.safetensors"])
    safetensors.numpy.save_file(state, folder / "a.safetensors", {"format": "pt"})
    return "a.safetensors"


def _compvis(folder: Path) -> str:
    write_compvis(folder / "a.safetensors", MODEL, params(), record=lambda path: RECORD)
    return "a.safetensors"


def _native(folder: Path) -> str:
    write_native(folder / "a.safetensors", MODEL, params(), TOKENIZER, record=lambda path: RECORD)
    return "a.safetensors"


def _folder(folder: Path) -> None:
    folder.rmdir()
    write_diffusers(folder, MODEL, params(), TOKENIZER, record=lambda path: RECORD)


def _shards(folder: Path) -> None:
    """A folder of others: a tower of safetensors, a UNet in two of them with an index, an autoencoder of torch's."""
    from tests.lightning import torch

    state = _others(folder)
    names = {
        name: f"diffusion_pytorch_model-{1 + i % 2:05}-of-00002.safetensors" for i, name in enumerate(state["unet"])
    }
    for shard in set(names.values()):
        half = {name: array for name, array in state["unet"].items() if names[name] == shard}
        safetensors.numpy.save_file(half, folder / "unet" / shard)
    index = json.dumps({"metadata": {"total_size": 1}, "weight_map": names})
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    safetensors.numpy.save_file(state["clip"], folder / "text_encoder" / "model.safetensors")
    vae = {name: torch.from_numpy(array.copy()) for name, array in state["vae"].items()}
    torch.save(vae, folder / "vae" / "diffusion_pytorch_model.bin")


def _flax(folder: Path) -> None:
    """As diffusers' Flax pipelines wrote it: modules in modules, under Flax' words and with its axes."""
    for component, state in _others(folder).items():
        tree = flax.traverse_util.unflatten_dict(dict(_flax_leaf(name, array) for name, array in state.items()))
        file = "flax_model.msgpack" if component == "clip" else "diffusion_flax_model.msgpack"
        (folder / FOLDERS[component] / file).write_bytes(flax.serialization.to_bytes(tree))


def _flax_leaf(name: str, array: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    *modules, leaf = name.split(".")
    if modules[-1] in ("token_embedding", "position_embedding"):
        return (*modules, "embedding"), array
    if array.ndim == 1:
        return (*modules, "bias" if leaf == "bias" else "scale"), array
    return (*modules, "kernel"), array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _others(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """A diffusers folder without its weights -> those, by component."""
    _folder(folder)
    (folder / sums.NAME).unlink()
    state = {}
    for component, name in FOLDERS.items():
        (file,) = (folder / name).glob("*.safetensors")
        state[component] = safetensors.numpy.load(file.read_bytes())
        file.unlink()
    return state


_WRITE: dict[str, Callable[[Path], str | None]] = {
    "ckpt": _ckpt,
    "safetensors": _safetensors,
    "compvis": _compvis,
    "native": _native,
    "folder": _folder,
    "shards": _shards,
    "flax": _flax,
}
KINDS = tuple(_WRITE)


# ---- what must hold ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Mutant:
    kind: str
    files: dict[str, bytes] = dataclasses.field(repr=False)
    steps: tuple[str, ...]  # what was done to the original, in words
    way: str = "whole"  # to open it: "whole", "info", or the network that is asked for alone
    verify: bool = True
    exact: bool = False  # it is refused, or the same as the original

    def _repr_pretty_(self, printer, cycle: bool) -> None:  # hypothesis' own would spell out the files
        printer.text(repr(self))


@dataclasses.dataclass(frozen=True)
class Outcome:
    opened: bool
    peak: int  # bytes of memory
    bound: int  # that these stayed under


def examine(mutant: Mutant, root: Path | None = None) -> Outcome:
    """Write a mutant into a folder in ``root``, open it and read all of it. Raises AssertionError if what must does not
    hold: a value or a RequestError (WeightsError is one) comes of it, in bounded time; messages are fit for a terminal;
    memory stays under twice the files' size and a constant; and nothing is started, imported, written, or read but
    these files.
    """
    base = original(mutant.kind)
    bound = CONSTANT + 2 * sum(map(len, mutant.files.values()))
    with tempfile.TemporaryDirectory(dir=root) as temporary:
        for name, content in mutant.files.items():
            path = Path(temporary, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        path = Path(temporary, base.main)
        with _watched(temporary) as watch:
            opened = _answer(functools.partial(_open, mutant, path, base.options))
            if isinstance(opened, dict):
                _check_text(as_text(opened))
            elif opened is not None:
                _read(opened, mutant.exact)
    assert not watch.events, f"it did more than read: {watch.events[:5]}"
    assert watch.peak < bound, f"{watch.peak:,} bytes of memory where {bound:,} are allowed"
    return Outcome(opened is not None, watch.peak, bound)


def _open(mutant: Mutant, path: Path, options: dict[str, Any]) -> Any:
    if mutant.way == "whole":
        return open_source(path, verify=mutant.verify, **options)
    if mutant.way == "info":
        return inspect(path, config=options.get("config"), verify=mutant.verify)
    return open_part(mutant.way, str(path), MODEL, Request(verify=mutant.verify))


def _read(opened: Any, exact: bool) -> None:
    """All parameters of a Source or Part."""
    if exact:
        assert opened.config == MODEL, f"another config without a word: {opened.config}"
        assert opened.tokenizer.vocab == TOKENIZER.vocab, "another tokenizer without a word"
    for path, parameter in opened.parameters.items():
        values = _answer(parameter.read)
        if values is not None:
            assert values.shape == parameter.shape and np.isfinite(values).all()
            assert not exact or np.array_equal(values, params()[path]), f"{path} has other values without a word"


def _answer(call: Callable[[], Any]) -> Any:
    """None where it is refused as it should be."""
    try:
        return call()
    except RequestError as error:
        first, *table = str(error).split("\n")
        assert first.strip() and len(first) < 4000, f"a message of {len(first)} characters: {first[:1000]}"
        assert all(row.startswith(("  dtype ", "  extra ", "  missing ", "  shape ")) for row in table), str(error)
        assert all(len(row) < 1000 for row in table), str(error)
        _check_text(str(error))
        return None


def _check_text(text: str) -> None:
    """Some characters move a terminal's cursor or turn its text around, and some cannot be printed at all."""
    wrong = {c for c in text if not c.isprintable() and c != "\n"}
    assert not wrong, f"{sorted(wrong)!r} in {text[:1000]!r}"


# ---- watching ------------------------------------------------------------------------------------------------------

# Events of Python's audit hooks (PEP 578) that no reader of a file has a reason for.
_STARTS = ("exec", "compile", "import", "os.system", "subprocess.", "os.posix_spawn", "os.spawn", "os.exec", "os.fork")
_TOUCHES = ("socket.", "ctypes.", "pickle.", "marshal.", "shutil.", "tempfile.", "os.remove", "os.rename", "os.mkdir")
_TOUCHES += ("os.rmdir", "os.link", "os.symlink", "os.chmod", "os.chown", "os.truncate", "os.utime", "os.putenv")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class TooLong(BaseException):
    """Out of CPU time. No ``except Exception`` takes it for something else."""


class _Watch:
    """What threads do that are started under it, or had it started."""

    def __init__(self, folder: str):
        self.folder, self.events, self.peak = folder, [], 0
        self.others = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}

    def hear(self, event: str, args: tuple) -> None:
        if threading.get_ident() in self.others:
            return
        outside = event == "open" and (args[2] & _WRITES or not str(args[0]).startswith(self.folder))
        if outside or event.startswith(_STARTS + _TOUCHES):
            self.events.append(f"{event} {args!r:.300}")


_watches: list[_Watch] = []


@functools.cache
def _hook() -> None:
    """Once for the process, as no hook can be taken out."""
    sys.addaudithook(lambda event, args: _watches[-1].hear(event, args) if _watches else None)


@contextlib.contextmanager
def _watched(folder: str) -> Iterator[_Watch]:
    """While the block runs, what it does is heard, its memory is measured and its CPU time is limited."""

    def too_long(signum, frame):
        raise TooLong

    _hook()
    watch = _Watch(folder)
    previous = signal.signal(signal.SIGPROF, too_long)
    gc.disable()  # what else is garbage may remove files when it is collected
    tracemalloc.start()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    _watches.append(watch)
    try:
        yield watch
    except TooLong:
        raise AssertionError(f"more than {SECONDS} s of CPU time") from None
    finally:
        _watches.remove(watch)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
        watch.peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        gc.enable()
