"""The safetensors format: lazily read, and written one tensor at a time.

A file is 8 bytes of length, a JSON header of that length (name -> dtype, shape, data offsets; ``__metadata__`` ->
texts), and the data. The safetensors library takes the last of two equal keys in silence and has no checksums. Here a
header is checked in full before a tensor is looked at, and the files we write carry a CRC-32 of every tensor, and of
the header, in their metadata, where other readers ignore it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import os
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sd_jax.types import RequestError, WeightsError
from sd_jax.weights.stored_zip import map_file
from sd_jax.weights.torch_pickle import HOSTILE, short

MAX_HEADER = 64 << 20  # bytes; v1-4's is 200 kB

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_CRC = "sd_jax_crc32"  # metadata: 8 hex digits for each tensor in order of offset, then 8 for the header


@dataclasses.dataclass(frozen=True)
class SafeTensor:
    """A tensor that still lies in the file."""

    path: str
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    content: memoryview
    crc: int | None

    def read(self) -> np.ndarray:
        """A read-only view of the file. Raises WeightsError where its bytes do not match the CRC written with them."""
        if self.crc is not None and zlib.crc32(self.content) != self.crc:
            raise WeightsError(f"{self.path} is damaged: {short(self.name)} does not match its CRC; get the file again")
        return (
            np.ndarray(self.shape, self.dtype, self.content) if len(self.content) else np.empty(self.shape, self.dtype)
        )


def open_safetensors(path: str | os.PathLike) -> tuple[dict[str, SafeTensor], dict[str, str]]:
    """-> (tensors by name, metadata). Reads the header alone. Raises WeightsError."""
    path = os.fspath(path)
    data = map_file(path)
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > MAX_HEADER or data[8:9] != b"{":
        raise WeightsError(f"{path} is not a safetensors file: it starts with {bytes(data[:8])!r}; download it again")
    if len(data) < 8 + length:
        raise WeightsError(
            f"{path} is cut short: {8 + length} bytes or more expected, {len(data)} there; download it again"
        )
    raw, body = bytes(data[8 : 8 + length]), data[8 + length :]
    header = _parse(path, raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WeightsError(f"{path} has metadata that are not texts; {HOSTILE}")
    entries = [_entry(path, name, entry) for name, entry in header.items()]
    entries.sort(key=lambda entry: entry[3])
    end = 0
    for name, _, _, start, stop in entries:
        if start != end:
            raise WeightsError(
                f"{path} has bytes {end} to {start} twice or not at all, before {short(name)}; {HOSTILE}"
            )
        end = stop
    if end != len(body):
        raise WeightsError(
            f"{path} is cut short or too long: {8 + length + end} bytes expected, {len(data)} there; download it again"
        )
    crcs = _checksums(path, raw, metadata, len(entries))
    tensors = {
        name: SafeTensor(path, name, dtype, shape, body[start:stop], crc)
        for (name, dtype, shape, start, stop), crc in zip(entries, crcs, strict=True)
    }
    return tensors, metadata


def write_safetensors(
    path: str | os.PathLike,
    tensors: Iterable[tuple[str, tuple[int, ...], Any, Callable[[], np.ndarray]]],
    metadata: dict[str, str],
    *,
    overwrite: bool = False,
) -> None:
    """Write (name, shape, dtype, read) tensors, each read when its turn comes and dropped behind it.

    The file appears under its name only when it is whole. Raises RequestError where it is there already (without
    ``overwrite``, or as a folder) or the disk has too little room.
    """
    if os.path.isdir(path):
        raise RequestError(f"{os.fspath(path)} is a folder, and a file is to be written; choose another name")
    tensors = [(name, tuple(shape), np.dtype(dtype), read) for name, shape, dtype, read in tensors]
    header: dict[str, Any] = {"__metadata__": {**metadata, _CRC: "0" * 8 * (len(tensors) + 1)}}
    end = 0
    for name, shape, dtype, _ in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with replacing(path, overwrite=overwrite, size=8 + len(raw) + end) as temporary, open(temporary, "wb") as f:
        f.write(len(raw).to_bytes(8, "little") + raw)
        crcs = []
        for name, shape, dtype, read in tensors:
            array = np.asarray(read(), order="C")
            assert (array.shape, array.dtype) == (shape, dtype), (name, array.shape, array.dtype)
            content = memoryview(array.reshape(-1).view(np.uint8))
            crcs.append(zlib.crc32(content))
            f.write(content)
            del array, content
        checks = "".join(f"{crc:08x}" for crc in (*crcs, zlib.crc32(raw))).encode()
        f.seek(8 + raw.index(b"0" * len(checks), raw.index(_CRC.encode())))
        f.write(checks)
        f.flush()
        os.fsync(f.fileno())


@contextlib.contextmanager
def replacing(path: str | os.PathLike, *, overwrite: bool, size: int = 0) -> Iterator[Path]:
    """A temporary name beside ``path``, renamed to it at the end, and removed where the end is not reached."""
    path = Path(path)
    unique = uuid.uuid4().hex
    temporary = path.with_name(f".{path.name}.{unique}.tmp")
    if path.exists() and not overwrite:
        raise RequestError(f"{path} is there already; choose another name or remove it")
    if not path.parent.is_dir():
        raise RequestError(f"there is no folder {path.parent} to write {path.name} into; make it first")
    if (free := shutil.disk_usage(path.parent).free) < size:
        raise RequestError(f"{path} needs {size} bytes and the disk has {free} left; make room or choose another place")
    try:
        yield temporary
        if temporary.is_dir() and path.exists():
            old = path.with_name(f".{path.name}.{unique}.old")
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def _parse(path: str, raw: bytes) -> dict[str, Any]:
    def unique(pairs):
        value = dict(pairs)
        if len(value) < len(pairs):
            double, _ = collections.Counter(name for name, _ in pairs).most_common(1)[0]
            raise WeightsError(f"{path} has the key {short(double)} twice in its header; {HOSTILE}")
        return value

    try:
        header = json.loads(raw, object_pairs_hook=unique)
    except WeightsError:
        raise
    except (ValueError, RecursionError):
        raise WeightsError(f"{path} has a header that is not JSON; {HOSTILE}") from None
    return header


def _entry(path: str, name: str, entry: Any) -> tuple[str, np.dtype, tuple[int, ...], int, int]:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, stop]}:
            pass
        case _:
            raise WeightsError(f"{path} describes {short(name)} by something else than a tensor; {HOSTILE}")
    if dtype not in _DTYPES:
        raise WeightsError(f"{path} has {short(name)} in {short(dtype)}; float16, bfloat16 and float32 are read")
    plain = all(type(n) is int and 0 <= n < 1 << 62 for n in (*shape, start, stop)) and len(shape) <= 16
    if not plain or stop - start != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise WeightsError(f"{path} has {short(name)} with a shape that its bytes do not have; {HOSTILE}")
    return name, _DTYPES[dtype], tuple(shape), start, stop


def _checksums(path: str, raw: bytes, metadata: dict[str, str], count: int) -> list[int | None]:
    """The CRC of each tensor; None in files of other writers. Checks the header's own."""
    checks = metadata.get(_CRC)
    if checks is None:
        return [None] * count
    try:
        crcs = [int(checks[i : i + 8], 16) for i in range(0, len(checks), 8)]
    except ValueError:
        crcs = []
    sound = len(crcs) == count + 1
    if not sound or zlib.crc32(raw.replace(checks.encode(), b"0" * len(checks), 1)) != crcs[-1]:
        raise WeightsError(f"{path} is damaged: its header does not match its CRC; get the file again")
    return crcs[:-1]
