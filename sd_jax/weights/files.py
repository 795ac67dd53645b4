"""Files of weights: which a component may lie in, and how each is opened, whatever its format."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd_jax.config import SDConfig
from sd_jax.tokenizer import Tokenizer
from sd_jax.types import WeightsError
from sd_jax.weights import hub, sums
from sd_jax.weights.flax_file import open_flax
from sd_jax.weights.parameters import Tensor
from sd_jax.weights.safetensors_file import MAX_COMMAS, SUMS, open_safetensors
from sd_jax.weights.torch_pickle import HOSTILE, short
from sd_jax.weights.torch_zip import open_checkpoint

TINY = Path(__file__).parents[1] / "tiny"  # the embedded model
FOLDERS = {"clip": "text_encoder", "unet": "unet", "vae": "vae"}  # of a diffusers folder
NON_EMA = "non_ema"  # diffusers' variant of a UNet whose weights are not averaged
MAX_SHARDS = 100
MAX_JSON = 8 << 20  # bytes; the index of v1-4's shards has 100 kB
MAX_NESTING = 16  # of the values in a JSON file; a config's are 3 deep
MAX_VALUE = 1000  # characters of a value that is no object; a record's, of 16 numbers, has 400


@dataclasses.dataclass(frozen=True)
class Request:
    """How a source is to be read; see ``open_source``."""

    revision: str | None = None
    ema: bool | None = None
    variant: str | None = None
    tokenizer: Tokenizer | str | Path | None = None
    config: SDConfig | str | Path | None = None
    verify: bool = True
    skip: frozenset[str] = frozenset()  # components that come from elsewhere
    needs_tokenizer: bool = True


@dataclasses.dataclass(frozen=True)
class WeightFile:
    """Tensors that still lie in a file, or in the shards that an index names."""

    tensors: Mapping[str, Tensor]
    kind: str  # "safetensors", "torch zip" or "Flax msgpack"
    paths: tuple[Path, ...]  # those that hold tensors
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()  # entries that are no tensors
    foreign: tuple[str, ...] = ()  # classes that a pickle names, none of which was imported

    def __post_init__(self):
        odd = next((name for name in self.tensors if not name.isprintable()), None)
        if odd is not None:  # such names end in messages and tables
            raise WeightsError(f"{self.paths[0]} has a tensor with the name {short(odd)}; {HOSTILE}")


def open_weights(path: Path, *, verify: bool = True) -> WeightFile:
    """Open a .safetensors, .ckpt, .bin or .msgpack, or the index of shards; the content decides. Reads no tensor.

    ``verify``: check what checksums the format has, each tensor's when it is read. Raises WeightsError.
    """
    if path.name.endswith(".json"):
        return _open_shards(path, verify)
    try:
        with open(path, "rb") as f:
            head = f.read(16)
    except OSError as e:
        raise WeightsError(f"{path} cannot be read ({e.strerror}); check its permissions") from None
    if path.suffix == ".msgpack":
        return WeightFile(open_flax(path), "Flax msgpack", (path,))
    if head[:2] == b"PK" or (path.suffix in (".ckpt", ".bin", ".pt", ".pth") and head[8:9] != b"{"):
        file = open_checkpoint(path, verify=verify)
        return WeightFile(file.tensors, "torch zip", (path,), {}, tuple(file.ignored), tuple(file.foreign))
    tensors, metadata = open_safetensors(path, verify=verify)
    return WeightFile(tensors, "safetensors", (path,), metadata)


def paths_of(path: Path) -> list[Path]:
    """The files that hold the tensors of what ``open_weights`` takes: itself, or the shards of an index."""
    if not path.name.endswith(".json"):
        return [path]
    weight_map = read_json(path).get("weight_map")
    shards = sorted({str(shard) for shard in weight_map.values()}) if isinstance(weight_map, dict) else []
    few = shards[: MAX_SHARDS + 1]
    missing = [name for name in few if os.path.basename(name) != name or not os.path.isfile(path.parent / name)]
    if index := next((name for name in few if name.endswith(".json")), None):  # this one itself, perhaps
        raise WeightsError(f"{path} names {short(index)}, which is no file of weights; fetch the whole model")
    if missing or not shards or len(shards) > MAX_SHARDS:
        named = ", ".join(short(name) for name in missing[:8]) or f"{len(shards) or 'no'} files"
        raise WeightsError(f"{path} names {named}, missing beside it; fetch the whole model")
    return [path.parent / name for name in shards]


def _open_shards(index: Path, verify: bool) -> WeightFile:
    paths, weight_map = paths_of(index), read_json(index)["weight_map"]
    files = [open_weights(path, verify=verify) for path in paths]
    tensors: dict[str, Tensor] = {}
    for path, file in zip(paths, files, strict=True):
        for name, tensor in file.tensors.items():
            if weight_map.get(name) != path.name:
                raise WeightsError(
                    f"{path} has {short(name)}, which is not there by {index.name}; fetch the whole model"
                )
            tensors[name] = tensor
    if absent := [name for name in weight_map if name not in tensors]:
        raise WeightsError(f"{index} names {short(absent[0])}, which is in none of its files; fetch the whole model")
    ignored, foreign = (tuple(name for f in files for name in getattr(f, what)) for what in ("ignored", "foreign"))
    return WeightFile(tensors, files[0].kind, tuple(paths), {}, ignored, foreign)


def component_files(component: str, variant: str | None = None) -> list[str]:
    """Names that a component's weights may have in a diffusers folder, the preferred first."""
    safe, torch = ("model", "pytorch_model") if component == "clip" else ("diffusion_pytorch_model",) * 2
    own = f".{variant}" if variant else ""
    return [
        f"{safe}{own}.safetensors",
        f"{safe}.safetensors.index{own}.json",
        f"{torch}{own}.bin",
        f"{torch}.bin.index{own}.json",
    ]


def choose_file(folder: Path, component: str, variant: str | None, ema: bool | None) -> tuple[Path, str | None]:
    """The weights of a component in its folder -> (file, a sentence where they are not what they would be expected
    to be). Raises WeightsError where there are none.
    """
    wanted = wanted_files(component, variant, ema)
    file = next((folder / name for name in wanted if (folder / name).is_file()), None)
    if file is None:
        raise WeightsError(f"{folder} has none of {', '.join(wanted)}; fetch the whole model")
    if variant and variant not in file.name.split("."):
        return file, f"{folder.name}: there is no variant {variant}, and the plain weights are used"
    if not variant and ".fp16." in file.name:
        return file, f"{folder.name}: only the float16 variant is there, and it is used"
    return file, None


def wanted_files(component: str, variant: str | None, ema: bool | None) -> list[str]:
    """``component_files`` for a request, the preferred first. ``ema`` False leaves a UNet no choice."""
    if component == "unet" and ema is False:
        return component_files(component, NON_EMA)
    if variant:
        return component_files(component, variant) + component_files(component)
    flax = "flax_model.msgpack" if component == "clip" else "diffusion_flax_model.msgpack"
    return [*component_files(component), *component_files(component, "fp16"), flax]


def fetch_component(repo: str, revision: str | None, name: str, files: list[str]) -> None:
    """The first of the weight ``files`` that a repository has in its folder ``name`` ("." for its top)."""
    for file in files:
        wanted = [os.path.normpath(f"{name}/{file}")]
        if ".index." in file:
            stem, _, rest = wanted[0].partition(".index")
            stem, _, suffix = stem.rpartition(".")
            wanted.append(f"{stem}{rest.removesuffix('.json')}-*.{suffix}")
        if (hub.fetch(repo, wanted, revision) / wanted[0]).exists():
            return


def check_folder(folder: Path) -> None:
    """The small files of a folder that sd_jax wrote, against the list that is there. Raises WeightsError.

    Its weights carry their own sums; where one does not (any more), the whole of it is checked.
    """
    if not (folder / sums.NAME).is_file():
        return
    expected = sums.from_text((folder / sums.NAME).read_bytes().decode("utf-8", "replace"))
    inside = {name for name in expected if os.path.normpath(name) == name and not name.startswith(("/", ".."))}
    inside = {name for name in inside if "\0" not in name}
    own = {n for n in inside if n.endswith(".safetensors") and os.path.isfile(folder / n) and _has_sums(folder / n)}
    actual = sums.digests(folder, sorted(inside - own))
    for name, digest in actual.items():
        if digest not in (None, expected[name]):  # what is missing is missed where it is needed
            raise WeightsError(
                f"{folder / name} is not what was written there; fetch or convert the model again, or take it out of "
                f"{sums.NAME} if that is how you want it"
            )


def _has_sums(path: Path) -> bool:
    return SUMS in open_safetensors(path)[1]


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of moderate size. Raises WeightsError."""
    try:
        with open(file, "rb") as f:
            raw = f.read(MAX_JSON + 1)
        value = None if (large := len(raw) > MAX_JSON or raw.count(b",") > MAX_COMMAS) else json.loads(raw.decode())
    except (OSError, ValueError, RecursionError) as e:
        raise WeightsError(f"{file} is not JSON ({e}); fetch it again") from None
    if large:
        raise WeightsError(f"{file} is larger than any file of its kind; fetch it again")
    if not isinstance(value, dict):
        raise WeightsError(f"{file} holds a {type(value).__name__} where an object is expected; fetch it again")
    if not _short(value):
        raise WeightsError(f"{file} has a value that is too long, or too deep in others; fetch it again")
    return value


def _short(value: Any, depth: int = MAX_NESTING) -> bool:
    """Whether every value of a JSON object can be quoted in a message: ``repr`` of a deep one fails, like ``json``."""
    if isinstance(value, dict):
        return depth > 0 and all(_short(inner, depth - 1) for inner in value.values())
    if isinstance(value, list) and not (depth > 0 and all(_short(inner, depth - 1) for inner in value)):
        return False
    return len(repr(value)) <= MAX_VALUE


def as_path(text: str) -> Path:
    return Path(os.path.expanduser(text))  # unlike Path.expanduser, this leaves a "~" whose home is unknown alone
