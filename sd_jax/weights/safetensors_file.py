"""The safetensors format: lazily read, and written one tensor at a time.

A file is 8 bytes of length, a JSON header of that length (name -> dtype, shape, data offsets; ``__metadata__`` ->
texts), and the data. The safetensors library takes the last of two equal keys in silence and has no checksums. Here a
header is checked in full before a tensor is looked at, and the files we write carry the SHA-256 of every tensor, and of
the header, in their metadata, where other readers ignore it.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sd_jax.types import RequestError, WeightsError
from sd_jax.weights.mapped import MappedFile, ahead
from sd_jax.weights.torch_pickle import HOSTILE, MAX_EMPTY, short

MAX_HEADER = 8 << 20  # bytes; v1-4's is 200 kB, and 2 MB with a tokenizer
MAX_COMMAS = 250_000  # in JSON, and so values, which take 240 bytes each at worst; v1-4 with a tokenizer has 110,000

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
SUMS = "sd_jax_sha256"  # metadata: 64 hex digits for each tensor in order of offset, then 64 for the header
RESERVED = 8192  # bytes of a header that metadata may take that are known only when the tensors are written


@dataclasses.dataclass(frozen=True)
class SafeTensor:
    """A tensor that still lies in the file."""

    file: MappedFile
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # bytes in the file
    stop: int
    sha256: str | None  # to be checked when it is read

    def read(self) -> np.ndarray:
        """A read-only view of the file. Raises WeightsError where its bytes are not those that were written."""
        content = self.file.data[self.start : self.stop]
        if self.sha256 is not None and hashlib.sha256(content).hexdigest() != self.sha256:
            raise WeightsError(
                f"{self.file.path} is damaged: {short(self.name)} does not match its SHA-256; get the file again"
            )
        return np.ndarray(self.shape, self.dtype, content) if len(content) else np.empty(self.shape, self.dtype)

    def forget(self) -> None:
        """Its bytes may leave memory; ``read`` brings them back."""
        self.file.forget(self.start, self.stop)


def open_safetensors(path: str | os.PathLike, *, verify: bool = True) -> tuple[dict[str, SafeTensor], dict[str, str]]:
    """-> (tensors by name, metadata). Reads the header alone.

    ``verify``: check the header now, and each tensor when it is read, against the SHA-256 of files that have them.
    Raises WeightsError.
    """
    path = os.fspath(path)
    file = MappedFile(path)
    data = file.data
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > MAX_HEADER or data[8:9] != b"{":
        raise WeightsError(f"{path} is not a safetensors file: it starts with {bytes(data[:8])!r}; download it again")
    if len(data) < 8 + length:
        raise WeightsError(
            f"{path} is cut short: {8 + length} bytes or more expected, {len(data)} there; download it again"
        )
    raw, begin = bytes(data[8 : 8 + length]), 8 + length
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
    if begin + end != len(data):
        raise WeightsError(
            f"{path} is cut short or too long: {begin + end} bytes expected, {len(data)} there; download it again"
        )
    sums = _sums(path, raw, metadata, len(entries)) if verify else [None] * len(entries)
    tensors = {
        name: SafeTensor(file, name, dtype, shape, begin + start, begin + stop, sha256)
        for (name, dtype, shape, start, stop), sha256 in zip(entries, sums, strict=True)
    }
    return tensors, metadata


def write_safetensors(
    path: str | os.PathLike,
    tensors: Iterable[tuple[str, tuple[int, ...], Any, Callable[[], np.ndarray]]],
    metadata: dict[str, str],
    *,
    overwrite: bool = False,
    complete: Callable[[Path], dict[str, str]] | None = None,
) -> None:
    """Write (name, shape, dtype, read) tensors, some read ahead in threads, each dropped when it is written.

    ``complete`` is called with the whole file, still under another name, and returns metadata to be added, of at most
    RESERVED bytes. The file appears under its name only then. Raises RequestError where it is there already (without
    ``overwrite``, or as a folder) or the disk has too little room.
    """
    if os.path.isdir(path):
        raise RequestError(f"{os.fspath(path)} is a folder, and a file is to be written; choose another name")
    tensors = [(name, tuple(shape), np.dtype(dtype), read) for name, shape, dtype, read in tensors]
    header: dict[str, Any] = {}
    end = 0
    for name, shape, dtype, _ in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    sums = ["0" * 64] * len(tensors)
    length = len(_header(metadata, header, sums)) + (RESERVED if complete is not None else 0)
    length += -length % 8
    with replacing(path, overwrite=overwrite, size=8 + length + end) as temporary, open(temporary, "wb") as f:

        def write_header(metadata: dict[str, str]) -> None:
            f.seek(0)
            f.write(length.to_bytes(8, "little") + _header(metadata, header, sums, length))
            f.flush()

        f.seek(8 + length)
        for i, (content, sha256) in enumerate(ahead(_content, tensors)):
            f.write(content)
            sums[i] = sha256
            del content
        write_header(metadata)
        if complete is not None:
            with concurrent.futures.ThreadPoolExecutor(1) as pool:  # the disk need not wait for it
                flushed = pool.submit(os.fsync, f.fileno())
                completed = complete(temporary)
                flushed.result()
            write_header(metadata | completed)
        os.fsync(f.fileno())


def _content(entry: tuple[str, tuple[int, ...], np.dtype, Callable[[], np.ndarray]]) -> tuple[memoryview, str]:
    """-> (the bytes of a tensor, their SHA-256)."""
    name, shape, dtype, read = entry
    array = np.asarray(read(), order="C")
    assert (array.shape, array.dtype) == (shape, dtype), (name, array.shape, array.dtype)
    content = memoryview(array.reshape(-1).view(np.uint8))
    return content, hashlib.sha256(content).hexdigest()


def _header(metadata: dict[str, str], entries: dict[str, Any], sums: list[str], length: int = 0) -> bytes:
    """The header as JSON, filled up with spaces to ``length``. Its own SHA-256 is taken with zeros in place of sums."""
    zeros = "0" * 64 * (len(sums) + 1)
    raw = json.dumps({"__metadata__": {**metadata, SUMS: zeros}, **entries}).encode().ljust(length)
    assert len(raw) <= length or not length, f"{len(raw)} bytes of header in a place for {length}"
    return raw.replace(zeros.encode(), "".join((*sums, hashlib.sha256(raw).hexdigest())).encode(), 1)


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

    if raw.count(b",") > MAX_COMMAS:
        raise WeightsError(f"{path} has more than {MAX_COMMAS} values in its header; {HOSTILE}")
    try:
        header = json.loads(raw.decode(), object_pairs_hook=unique)  # of bytes it would take UTF-16 and UTF-32, too
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
    plain = plain and math.prod(filter(None, shape)) <= MAX_EMPTY
    if not plain or stop - start != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise WeightsError(f"{path} has {short(name)} with a shape that its bytes do not have; {HOSTILE}")
    return name, _DTYPES[dtype], tuple(shape), start, stop


def _sums(path: str, raw: bytes, metadata: dict[str, str], count: int) -> list[str | None]:
    """The SHA-256 of each tensor; None in files of other writers. Checks the header's own."""
    joined = metadata.get(SUMS)
    if joined is None:
        return [None] * count
    sums = [joined[i : i + 64] for i in range(0, len(joined), 64)]
    sound = re.fullmatch("[0-9a-f]*", joined) and len(joined) == 64 * (count + 1)
    if not sound or hashlib.sha256(raw.replace(joined.encode(), b"0" * len(joined), 1)).hexdigest() != sums[-1]:
        raise WeightsError(f"{path} is damaged: its header does not match its SHA-256; get the file again")
    return sums[:-1]
