"""diffusers-Flax' own files (``diffusion_flax_model.msgpack``, ``flax_model.msgpack``; written until diffusers 0.39).

They are what ``flax.serialization.to_bytes`` makes of nested dictionaries: msgpack maps, whose leaves are extensions of
type 1 that hold the msgpack of (shape, name of the dtype, bytes). flax' own reader copies a file twice; this one maps
it, and knows no more of msgpack than such files have. They name the same modules as diffusers' torch files, with Flax'
words for the leaves and Flax' axes.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re

import ml_dtypes
import numpy as np

from sd_jax.types import WeightsError
from sd_jax.weights.mapped import MappedFile
from sd_jax.weights.torch_pickle import HOSTILE, MAX_EMPTY, MAX_NAME, short

MAX_DEPTH = 32  # of modules in modules; v1's are 8 deep
MAX_DIMS = 16
MAX_LEAVES = 1 << 16
MAX_ENTRIES = 1 << 18  # leaves and modules

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
_INDEX = re.compile(r"(?<!linear)_(\d+)(?=\.)")  # resnets_0 -> resnets.0; torch too says linear_1
_DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
_ARRAY = 1  # the type of the extension


@dataclasses.dataclass(frozen=True)
class FlaxTensor:
    """An array that still lies in the file, seen with torch's axes."""

    file: MappedFile
    dtype: np.dtype
    stored: tuple[int, ...]  # its shape in the file
    axes: tuple[int, ...]
    start: int  # bytes in the file
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stored[axis] for axis in self.axes)

    def read(self) -> np.ndarray:
        """A read-only view of the file."""
        content = self.file.data[self.start : self.stop]
        array = np.ndarray(self.stored, self.dtype, content) if len(content) else np.empty(self.stored, self.dtype)
        return array.transpose(self.axes)

    def forget(self) -> None:
        """Its bytes may leave memory; ``read`` brings them back."""
        self.file.forget(self.start, self.stop)


def open_flax(path: str | os.PathLike) -> dict[str, FlaxTensor]:
    """Tensors under diffusers' torch names and axes. Reads names and shapes alone. Raises WeightsError."""
    reader = _Reader(MappedFile(path))
    leaves: dict[str, FlaxTensor] = {}
    reader.module((), leaves)
    if reader.at != len(reader.data):
        raise reader.error("it goes on after its end")
    return leaves


class _Reader:
    """Just as much of msgpack (github.com/msgpack/msgpack, spec.md) as such a file needs."""

    def __init__(self, file: MappedFile):
        self.file, self.data, self.at, self.entries = file, file.data, 0, 0

    def module(self, path: tuple[str, ...], leaves: dict[str, FlaxTensor]) -> None:
        """A map of modules and arrays; adds its arrays, by their torch names, to ``leaves``."""
        if len(path) > MAX_DEPTH:
            raise self.error("it has modules too deep in one another")
        count = self.number(_MAPS)
        self.entries += count
        if self.entries > MAX_ENTRIES:
            raise self.error(f"it has {self.entries} modules and arrays")
        for _ in range(count):
            inner = (*path, self.text())
            if self.peek() not in _EXTENSIONS:
                self.module(inner, leaves)
                continue
            name = _name(inner)
            if name in leaves or len(leaves) >= MAX_LEAVES:
                raise self.error(f"it has {short(name)} twice, or too many arrays")
            leaves[name] = self.array(inner)

    def array(self, path: tuple[str, ...]) -> FlaxTensor:
        """The extension that flax.serialization packs an array in."""
        size = self.number(_EXTENSIONS)
        kind = self.take(1)[0]
        end = self.at + size
        if kind != _ARRAY or self.number(_LISTS) != 3:
            raise self.error(f"{_where(path)} is no array")
        if (rank := self.number(_LISTS)) > MAX_DIMS:
            raise self.error(f"{_where(path)} has {rank} axes")
        stored = tuple(self.number(_COUNTS) for _ in range(rank))
        name = self.text()
        if name not in _DTYPES:
            raise self.error(f"{_where(path)} is in {short(name)}, which is not read")
        dtype, length = _DTYPES[name], self.number(_BINARIES)
        start = self.at
        self.take(length)
        vast = math.prod(filter(None, stored)) > MAX_EMPTY
        if self.at != end or length != math.prod(stored) * dtype.itemsize or vast:
            raise self.error(f"{_where(path)} has a shape that its bytes do not have")
        return FlaxTensor(self.file, dtype, stored, _axes(path, len(stored)), start, self.at)

    def number(self, kinds: dict[int, tuple[int, int]]) -> int:
        """A count: some codes are the number themselves, others say in how many bytes it follows."""
        code = self.take(1)[0]
        if code not in kinds:
            raise self.error(f"byte 0x{code:02x} is not expected there")
        value, size = kinds[code]
        return value if size == 0 else int.from_bytes(self.take(size))

    def text(self) -> str:
        if (length := self.number(_TEXTS)) > MAX_NAME:  # every array below has it in its own name
            raise self.error(f"a name has {length} bytes")
        raw = bytes(self.take(length))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.error("a name is not UTF-8") from None

    def peek(self) -> int | None:
        return self.data[self.at] if self.at < len(self.data) else None

    def take(self, n: int) -> memoryview:
        if n > len(self.data) - self.at:
            raise self.error(f"it is cut short: {self.at + n} bytes or more expected, {len(self.data)} there")
        self.at += n
        return self.data[self.at - n : self.at]

    def error(self, reason: str) -> WeightsError:
        return WeightsError(f"{self.file.path} is not a Flax checkpoint: {reason} (byte {self.at}); {HOSTILE}")


def _kinds(*sized: tuple[int, int], fixed: range = range(0)) -> dict[int, tuple[int, int]]:
    """code -> (value, 0) for the codes ``fixed``, which are the numbers from 0, and (0, bytes that follow)."""
    return {code: (i, 0) for i, code in enumerate(fixed)} | {code: (0, size) for code, size in sized}


_MAPS = _kinds((0xDE, 2), (0xDF, 4), fixed=range(0x80, 0x90))
_LISTS = _kinds((0xDC, 2), (0xDD, 4), fixed=range(0x90, 0xA0))
_TEXTS = _kinds((0xD9, 1), (0xDA, 2), (0xDB, 4), fixed=range(0xA0, 0xC0))
_BINARIES = _kinds((0xC4, 1), (0xC5, 2), (0xC6, 4))
_EXTENSIONS = _kinds((0xC7, 1), (0xC8, 2), (0xC9, 4)) | {0xD4 + i: (1 << i, 0) for i in range(5)}
_COUNTS = _kinds((0xCC, 1), (0xCD, 2), (0xCE, 4), (0xCF, 8), fixed=range(0x80))


def _name(path: tuple[str, ...]) -> str:
    *modules, leaf = path
    return _INDEX.sub(r".\1", ".".join((*modules, ""))) + _LEAVES.get(leaf, leaf)


def _axes(path: tuple[str, ...], rank: int) -> tuple[int, ...]:
    """Of a kernel, torch's order: HWIO -> OIHW, IO -> OI."""
    if path[-1] != "kernel":
        return tuple(range(rank))
    return (3, 2, 0, 1) if rank == 4 else tuple(reversed(range(rank)))


def _where(path: tuple[str, ...]) -> str:
    return short(".".join(path))
