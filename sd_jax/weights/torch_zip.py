"""PyTorch's zip checkpoints (``.ckpt``, ``.bin``, ``.pt``) without torch, and without running any of their code.

``torch.save`` writes an uncompressed zip: ``<root>/data.pkl`` is a pickle that describes the tensors, and
``<root>/data/<key>`` holds the bytes of a storage. The file is mapped into memory, every tensor is checked to lie
inside its storage, and becomes a read-only view of the mapped bytes when it is asked for, after its storage has passed
the zip's CRC: a file of 4 GB costs no memory of its own.
"""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import ml_dtypes
import numpy as np

from sd_jax.types import WeightsError
from sd_jax.weights import torch_pickle
from sd_jax.weights.mapped import MappedFile
from sd_jax.weights.stored_zip import StoredZip
from sd_jax.weights.torch_pickle import HOSTILE, Global, short

MAX_PICKLE = 32 << 20  # bytes; v1-4's is under 1 MB
MAX_DIMS = 16
MAX_VIEWS = 8  # tensors that all view one storage, on the average: reading them takes their time, not the file's

_SCALARS = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint64": np.uint64,
    "uint32": np.uint32,
    "uint16": np.uint16,
    "uint8": np.uint8,
    "bool": np.bool_,
    "complex64": np.complex64,
    "complex128": np.complex128,
}
_DTYPES = {f"torch.{name}": np.dtype(scalar) for name, scalar in _SCALARS.items()}

_STORAGES = {
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
    "torch.ComplexFloatStorage": np.dtype(np.complex64),
    "torch.ComplexDoubleStorage": np.dtype(np.complex128),
    "torch.storage.UntypedStorage": np.dtype(np.uint8),
}


def open_checkpoint(path: str | os.PathLike, *, verify: bool = True) -> TorchFile:
    """Open a checkpoint that ``torch.save`` wrote. Reads its directory and its pickle, no tensor.

    The tensors are those under ``state_dict`` where the file has one (Lightning), else those of its top level. A
    global outside the allow-list is harmless elsewhere (callbacks, optimizer states), and an error among the tensors.
    ``verify``: check the CRC of each storage when it is first read. Raises WeightsError.
    """
    path = os.fspath(path)
    file = MappedFile(path)
    if file.data[:4] != b"PK\x03\x04":
        raise WeightsError(f"{path} {_what(bytes(file.data[:512]))}")
    archive = StoredZip(file, _expected_size)
    root = _root(archive)
    order = archive.read(f"{root}/byteorder", 16) if f"{root}/byteorder" in archive.members else b"little"
    if order != b"little":
        raise WeightsError(f"{path} has the byte order {order!r}; only little-endian checkpoints are read")
    storages = _Storages(archive, f"{root}/data/", verify)
    pickled = archive.read(f"{root}/data.pkl", MAX_PICKLE)
    machine = torch_pickle.Machine(pickled, _builders(path), storages.find, f"the pickle of {path}")
    tensors, ignored = _tensors(path, machine.run())
    if sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values()) > MAX_VIEWS * len(file.data):
        raise WeightsError(f"{path} has tensors of more than {MAX_VIEWS} times its size; {HOSTILE}")
    return TorchFile(path, tensors, ignored, list(map(short, machine.foreign)))


@dataclasses.dataclass(frozen=True)
class TorchFile:
    """What a checkpoint holds: tensors by name, its other entries, and the globals that were named and not run."""

    path: str
    tensors: dict[str, LazyTensor]
    ignored: list[str]
    foreign: list[str]


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor that still lies in the file, inside its storage. ``offset`` and ``stride`` count elements."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def read(self) -> np.ndarray:
        """A read-only view of the file. Raises WeightsError where the storage does not match its CRC."""
        size = self.dtype.itemsize
        content = self.storage.read()
        if math.prod(self.shape) == 0:
            return np.empty(self.shape, self.dtype)
        # numpy checks here once more that every element lies within the storage.
        return np.ndarray(self.shape, self.dtype, content, self.offset * size, tuple(s * size for s in self.stride))

    def forget(self) -> None:
        """The storage may leave memory; ``read`` brings it back."""
        self.storage.forget()


@dataclasses.dataclass
class Storage:
    """The bytes that one or more tensors view: a member of the zip."""

    archive: StoredZip
    name: str
    dtype: np.dtype
    content: memoryview
    verified: bool

    def read(self) -> memoryview:
        if not self.verified:
            self.archive.check(self.name, self.content)
            self.verified = True
        return self.content

    def forget(self) -> None:
        start = self.archive.start(self.name)
        self.archive.file.forget(start, start + len(self.content))


class _Storages:
    """Storages by persistent id, each made once."""

    def __init__(self, archive: StoredZip, prefix: str, verify: bool):
        self.archive, self.prefix, self.verify = archive, prefix, verify
        self.known: dict[str, Storage] = {}

    def find(self, pid: Any) -> Storage | Global:
        """("storage", type, key, location, count) -> the storage, if the zip has just as many bytes."""
        path = self.archive.path
        match pid:
            case ("storage", Global() as kind, str(key), str(_), int(count)) if len(key) <= torch_pickle.MAX_NAME:
                name = self.prefix + key
            case _:
                raise WeightsError(f"{path} has a persistent id that is not a storage's; {HOSTILE}")
        if kind.name not in _STORAGES:
            return kind
        dtype, member = _STORAGES[kind.name], self.archive.members.get(name)
        if member is None:
            raise WeightsError(f"{path} has no member {short(name)}, which its pickle refers to; {HOSTILE}")
        if member.size != count * dtype.itemsize:
            claim = f"{short(str(count))} of {dtype}"
            raise WeightsError(
                f"{path} has {member.size} bytes in {short(name)} but its pickle says {claim}; {HOSTILE}"
            )
        if name not in self.known:
            self.known[name] = Storage(self.archive, name, dtype, self.archive.view(name), not self.verify)
        if self.known[name].dtype != dtype:
            raise WeightsError(f"{path} reads {short(name)} as {self.known[name].dtype} and as {dtype}; {HOSTILE}")
        return self.known[name]


def _root(archive: StoredZip) -> str:
    """The folder that everything in a torch zip lies in."""
    names = [name for name in archive.members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(names) != 1:
        raise WeightsError(
            f"{archive.path} is a zip with {len(names)} data.pkl where torch.save writes one; give a torch checkpoint"
        )
    return names[0].removesuffix("/data.pkl")


def _tensors(path: str, top: Any) -> tuple[dict[str, LazyTensor], list[str]]:
    """-> (tensors, the names of what else there is)."""
    if not isinstance(top, dict):
        raise WeightsError(f"{path} holds {_describe(top)} where a dictionary of tensors was expected; {HOSTILE}")
    nested = isinstance(top.get("state_dict"), dict)
    values = top["state_dict"] if nested else top
    for key, value in values.items():
        foreign = next((v for v in (key, value) if isinstance(v, Global)), None)
        if foreign is not None:
            raise WeightsError(
                f"{path} holds {_describe(foreign)} among its tensors (key {_describe(key)}), and no code of a "
                "checkpoint is ever run; get the weights as .safetensors"
            )
    tensors = {key: value for key, value in values.items() if isinstance(key, str) and isinstance(value, LazyTensor)}
    if not tensors:
        found = ", ".join(_describe(key) for key in list(values)[:8]) or "nothing"
        raise WeightsError(f"{path} holds no tensors at its top or under state_dict, but {found}; give model weights")
    others = [_describe(key) for key in top if nested and key != "state_dict"]
    return tensors, others + [_describe(key) for key in values if key not in tensors]


def _describe(value: Any) -> str:
    match value:
        case Global():
            return short(value.name)
        case str():
            return short(value)
        case int() | float():
            return short(repr(value))
    return f"a {type(value).__name__}"


def _builders(path: str) -> dict[str, torch_pickle.Builder]:
    """The allow-list: dotted name -> function of the pickled arguments. Storage types and dtypes are only named."""

    def wrong(what):
        return WeightsError(f"{path} makes {what} from the wrong arguments; {HOSTILE}")

    def ordered_dict(args):
        match args:
            case ():
                return {}
            case (list(pairs),) if all(isinstance(p, tuple | list) and len(p) == 2 for p in pairs):
                made = {key: value for key, value in pairs if isinstance(key, str)}
                pairs.clear()  # or one long list, used again and again, would take more memory than the file
                return made
        raise wrong("a dictionary")

    def size(args):
        match args:
            case (tuple(shape),):
                return shape
        raise wrong("a size")

    def tensor(args):
        match args:
            case (Storage() as storage, offset, shape, stride, *_):
                return _tensor(path, storage, storage.dtype, offset, shape, stride)
            case (Global() as storage, *_):
                return storage
        raise wrong("a tensor")

    def tensor_of_dtype(args):
        match args:
            case (Storage() as storage, offset, shape, stride, _, _, Global(name=name) as dtype, *_):
                return _tensor(path, storage, _DTYPES[name], offset, shape, stride) if name in _DTYPES else dtype
            case (Global() as storage, *_):
                return storage
        raise wrong("a tensor")

    def parameter(args):
        match args:
            case (LazyTensor() | Global() as value, *_):
                return value
        raise wrong("a parameter")

    def only_named(args):
        raise wrong("a storage or dtype")

    return {
        "collections.OrderedDict": ordered_dict,
        "torch.Size": size,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_tensor_v3": tensor_of_dtype,
        "torch._utils._rebuild_parameter": parameter,
        "torch._utils._rebuild_parameter_with_state": parameter,
        **dict.fromkeys((*_STORAGES, *_DTYPES), only_named),
    }


def _tensor(path: str, storage: Storage, dtype: np.dtype, offset: Any, shape: Any, stride: Any) -> LazyTensor:
    """Check that every element lies inside the storage, and that there are no more of them than it holds."""
    plain = isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride) <= MAX_DIMS
    if not plain or not all(type(n) is int and 0 <= n < 1 << 62 for n in (offset, *shape, *stride)):
        raise WeightsError(
            f"{path} has a tensor in {short(storage.name)} whose offset, shape or stride are not counts; {HOSTILE}"
        )
    count, held = math.prod(shape), len(storage.content) // dtype.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if count else offset - 1
    if last >= held or count > held or math.prod(filter(None, shape)) > torch_pickle.MAX_EMPTY:
        raise WeightsError(
            f"{path} has a tensor of shape {shape}, stride {stride} and offset {offset} in {short(storage.name)} "
            f"of {held} elements; {HOSTILE}"
        )
    return LazyTensor(storage, dtype, offset, shape, stride)


def _what(head: bytes) -> str:
    """What a file that is no zip is instead, from its first bytes."""
    if head.startswith(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.") or head[257:262] == b"ustar":
        return (
            "is in torch's format from before version 1.6, which is not read; convert it once with torch: "
            "torch.save(torch.load(old, weights_only=True), new)"
        )
    if head.startswith(b"version https://git-lfs"):
        return "is a pointer of git LFS, not the weights; fetch them with git lfs pull"
    if head.startswith(b"\x80"):
        return "is a bare pickle, which is never run; get the weights as .safetensors"
    return f"is not a torch checkpoint: it starts with {head[:8]!r}; give a .ckpt, .bin or .pt that torch.save wrote"


def _expected_size(data: memoryview) -> int | None:
    """The bytes of all storages, from the pickle at the start of a file that has lost its end."""
    sizes: dict[str, int] = {}

    def storage(pid):
        match pid:
            case ("storage", Global() as kind, str(key), str(_), int(count)) if kind.name in _STORAGES:
                sizes[key] = count * _STORAGES[kind.name].itemsize
        return Global("storage")

    try:
        names, extra = int.from_bytes(data[26:28], "little"), int.from_bytes(data[28:30], "little")
        torch_pickle.run(bytes(data[30 + names + extra :][:MAX_PICKLE]), _builders(""), storage, "")
    except WeightsError:
        return None
    return sum(sizes.values())
