"""What is in a checkpoint, told without loading it (``sd-jax info``): tensors are read one by one, and dropped."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sd_jax.config import SD_V1_4
from sd_jax.types import RequestError, WeightsError
from sd_jax.weights import sums
from sd_jax.weights.files import FOLDERS, Request, WeightFile, choose_file, open_weights, read_json, wanted_files
from sd_jax.weights.hub import WEIGHT_FILES
from sd_jax.weights.mapped import ahead
from sd_jax.weights.metadata import NATIVE, checked_record, from_metadata
from sd_jax.weights.other_models import recognise, recognise_config
from sd_jax.weights.parameters import MANY_EMA, Tensor, not_finite
from sd_jax.weights.parts import open_part
from sd_jax.weights.probe import SAME, distance, probe, recorded_probe
from sd_jax.weights.published import NAMES as PUBLISHED
from sd_jax.weights.source import Source, locate, open_whole, unread_folders
from sd_jax.weights.tables import COMPONENTS, NAMES, PREFIXES

_AVERAGED = "averaged"
_LABELS = {**NAMES, _AVERAGED: "averaged UNet", "other": "other"}
# How the names of a file with a single network begin.
_ALONE = {
    "clip": ("text_model.", "embeddings.", "encoder.layers.", "final_layer_norm."),
    "vae": ("encoder.", "decoder.", "quant_conv.", "post_quant_conv."),
    "unet": (
        *("down_blocks.", "up_blocks.", "mid_block.", "conv_in.", "conv_out.", "conv_norm_out.", "time_embedding."),
        *("input_blocks.", "output_blocks.", "middle_block.", "time_embed.", "out."),
    ),
}


def inspect(
    source: str | Path,
    *,
    revision: str | None = None,
    ema: bool | None = None,
    variant: str | None = None,
    tokenizer: Any = None,
    config: Any = None,
    verify: bool = True,
    run_probe: bool = False,
) -> dict[str, Any]:
    """What ``source`` is, as JSON-like values; ``as_text`` puts them in words.

    ``verify``: read every tensor, for its checksums and for values that are not finite, and hash every file. Without,
    names and shapes alone are read. ``run_probe``: run the networks (see ``probe``), and compare with the record that
    sd_jax left. The other arguments are those of ``open_source``.

    Keys: path, bytes, layout, model, runs (whether sd_jax does), why_not, revision, files [{path, bytes, kind, sha256,
    published}], parts {name: {tensors, parameters, bytes, dtypes}}, ema, prediction, not_finite, damaged, ignored,
    foreign, licence, record, probe, tensors {name: {shape, dtype, part}}.

    Raises:
      RequestError: no such source. WeightsError: its structure is broken, or hostile.
    """
    request = Request(revision, ema, variant, tokenizer, config, verify)
    path, commit = locate(str(source), request)
    files = _files(path, request)
    # A file of CompVis has no tokenizer to be looked at, and whether CLIP's can be had is another question.
    has_own = path.is_dir() or files[0][1].metadata.get("format") == NATIVE
    request = dataclasses.replace(request, needs_tokenizer=has_own or tokenizer is not None)
    opened, why_not = _try(path, commit, request)
    fits = None if opened is not None else _part_it_is(path, files, request)
    if fits is not None:
        why_not = f"it is one network; give a whole model, and this with --part {fits} {source}"
    info: dict[str, Any] = {
        "path": str(path),
        "bytes": sum(os.path.getsize(p) for _, file in files for p in file.paths),
        "layout": _layout(path, files),
        "model": _model(path, files, opened, fits),
        "runs": opened is not None,
        "why_not": why_not,
        "revision": commit,
        "files": [
            {"path": str(p.relative_to(path) if path.is_dir() else p.name), "bytes": os.path.getsize(p), "kind": f.kind}
            for _, f in files
            for p in f.paths
        ],
        "parts": _parts(files),
        "ema": _ema(files),
        "ignored": list(opened.report.ignored) if opened else [name for _, file in files for name in file.ignored],
        "foreign": [name for _, file in files for name in file.foreign],
        "licence": opened.licence if opened else None,
        "record": opened.record if opened else _record(path, files),
    }
    if opened is not None:
        info["prediction"] = opened.config.noise.prediction
        info["config"] = dataclasses.asdict(opened.config)
    elif path.is_dir():
        info["ignored"] += unread_folders(path)
    info["ignored"] += _other_weights(path, info["files"])
    if verify:
        info |= _read_all(files)
        found = sums.digests(path if path.is_dir() else path.parent, [file["path"] for file in info["files"]])
        for file in info["files"]:
            file["sha256"] = found[file["path"]]
            file["published"] = PUBLISHED.get(file["sha256"])
    if run_probe:
        info["probe"] = _probe(path, opened, why_not)
    info["tensors"] = {
        name: {"shape": list(tensor.shape), "dtype": str(tensor.dtype), "part": part}
        for part, name, tensor in _tensors(files, full_names=True)
    }
    return info


# ---- files ---------------------------------------------------------------------------------------------------------


def _files(path: Path, request: Request) -> list[tuple[str | None, WeightFile]]:
    """-> [(component, file)] of a folder, [(None, file)] of a file or of a folder with one network."""
    if not path.is_dir():
        return [(None, open_weights(path, verify=request.verify))]
    inside = {c: path / name for c, name in FOLDERS.items() if (path / name).is_dir()}
    if inside:
        chosen = {c: choose_file(folder, c, request.variant, request.ema)[0] for c, folder in inside.items()}
        return [(c, open_weights(file, verify=request.verify)) for c, file in chosen.items()]
    names = [name for c in COMPONENTS for name in wanted_files(c, request.variant, request.ema)]
    file = next((path / name for name in names if (path / name).is_file()), None)
    if file is None:
        raise RequestError(f"{path} holds no model: neither {', '.join(FOLDERS.values())} nor a file of weights")
    return [(None, open_weights(file, verify=request.verify))]


def _other_weights(path: Path, files: list[dict[str, Any]]) -> list[str]:
    """Files of weights in a folder's components that were not chosen: other variants and formats."""
    if not path.is_dir():
        return []
    chosen = {file["path"] for file in files}
    inside = (p for name in FOLDERS.values() for p in sorted((path / name).glob("*")))
    names = [p.relative_to(path).as_posix() for p in inside if p.suffix in WEIGHT_FILES]
    return [name for name in names if name not in chosen]


def _tensors(files: list[tuple[str | None, WeightFile]], full_names: bool = False) -> Iterator[tuple[str, str, Tensor]]:
    """(part, name, tensor) of all there are."""
    for component, file in files:
        part_of = _grouping(component, file)
        for name, tensor in file.tensors.items():
            prefix = f"{FOLDERS[component]}/" if full_names and component else ""
            yield part_of(name), prefix + name, tensor


def _grouping(component: str | None, file: WeightFile):
    """-> the function from a tensor's name to the part that it belongs to."""
    if component is not None:
        return lambda name: component
    own = file.metadata.get("format") == NATIVE
    starts = {c: (f"{c}/",) if own else (PREFIXES[c], PREFIXES[c].split(".")[0] + ".") for c in COMPONENTS}
    starts["unet"] = ("unet/",) if own else (PREFIXES["unet"],)
    if not any(name.startswith(start) for name in file.tensors for s in starts.values() for start in s):
        starts = _ALONE
    starts = {**starts, _AVERAGED: ("model_ema.",)}
    return lambda name: next((part for part, start in starts.items() if name.startswith(start)), "other")


def _parts(files: list[tuple[str | None, WeightFile]]) -> dict[str, dict[str, Any]]:
    parts: dict[str, dict[str, Any]] = {}
    for name, _, tensor in _tensors(files):
        part = parts.setdefault(name, {"tensors": 0, "parameters": 0, "bytes": 0, "dtypes": {}})
        size, dtype = math.prod(tensor.shape), np.dtype(tensor.dtype)
        part["tensors"] += 1
        part["parameters"] += size
        part["bytes"] += size * dtype.itemsize
        part["dtypes"][dtype.name] = part["dtypes"].get(dtype.name, 0) + 1
    return {name: parts[name] for name in _LABELS if name in parts}


def _ema(files: list[tuple[str | None, WeightFile]]) -> str | None:
    counts = {name: part["tensors"] for name, part in _parts(files).items()}
    if counts.get(_AVERAGED, 0) <= MANY_EMA:
        return None
    return "averaged and plain" if "unet" in counts else "averaged only"


def _read_all(files: list[tuple[str | None, WeightFile]]) -> dict[str, list[str]]:
    """Tensors that have NaN or infinite values, and those that do not match their checksums."""

    def read(entry: tuple[str, str, Tensor]) -> tuple[str, int, str | None]:
        _, name, tensor = entry
        try:
            bad = not_finite(tensor.read())
        except WeightsError as error:
            return name, 0, str(error)
        finally:
            tensor.forget()
        return name, bad, None

    results = list(ahead(read, _tensors(files, full_names=True)))
    return {
        "not_finite": [f"{name} ({bad} values)" for name, bad, _ in results if bad],
        "damaged": list(dict.fromkeys(error for _, _, error in results if error)),
    }


# ---- what it is ----------------------------------------------------------------------------------------------------


def _try(path: Path, commit: str | None, request: Request) -> tuple[Source | None, str | None]:
    try:
        return open_whole(path, commit, request), None
    except RequestError as error:
        return None, str(error)


def _part_it_is(path: Path, files: list[tuple[str | None, WeightFile]], request: Request) -> str | None:
    """The component of v1 that a file holds alone, and fits."""
    parts = [part for part in _parts(files) if part in COMPONENTS]
    if len(parts) != 1 or len(files) != 1:
        return None
    try:
        open_part(parts[0], str(path), SD_V1_4, request)
    except RequestError:
        return None
    return parts[0]


def _layout(path: Path, files: list[tuple[str | None, WeightFile]]) -> str:
    component, file = files[0]
    if component is not None:
        return "diffusers folder"
    if file.metadata.get("format") == NATIVE:
        return "native file"
    if any(name.startswith(tuple(PREFIXES.values())) for name in file.tensors):
        return "CompVis file"
    return "folder of one network" if path.is_dir() else "file of one network"


def _model(
    path: Path, files: list[tuple[str | None, WeightFile]], opened: Source | None, fits: str | None
) -> str | None:
    """In words, as far as it is known."""
    if opened is not None:
        like = "Stable Diffusion v1" if opened.licence else "of Stable Diffusion v1's architecture, at another size"
        inputs = opened.config.unet.in_channels
        return like + (f", inpainting ({inputs} input channels)" if inputs == 9 else "")
    if fits is not None:
        return f"{NAMES[fits]} of Stable Diffusion v1 alone"
    if path.is_dir() and (path / "unet" / "config.json").is_file():
        index = path / "model_index.json"
        other = recognise_config(read_json(index) if index.is_file() else {}, read_json(path / "unet" / "config.json"))
    else:
        other = recognise({name: tuple(t.shape) for _, file in files for name, t in file.tensors.items()})
    return None if other is None else other.split(",")[0]


def _record(path: Path, files: list[tuple[str | None, WeightFile]]) -> Mapping[str, Any] | None:
    text = files[0][1].metadata.get(NATIVE)
    return None if text is None else from_metadata(path, lambda: checked_record(json.loads(text)))


def _probe(path: Path, opened: Source | None, why_not: str | None) -> dict[str, Any]:
    if opened is None:
        raise RequestError(f"{path} cannot be probed, as sd_jax does not run it: {why_not}")
    found, recorded = probe(opened.config, opened.parameters), recorded_probe(opened.record)
    if recorded is None:
        return {"numbers": found, "same": None}
    name, off = distance(recorded, found)
    return {"numbers": found, "same": off <= SAME, "worst": name, "off": off}


# ---- in words ------------------------------------------------------------------------------------------------------


def as_text(info: Mapping[str, Any], *, tensors: bool = False) -> str:
    """The lines that people read; ``tensors``: all their names and shapes, too."""
    rows: list[tuple[str, str]] = [("model", info["model"] or "not known"), ("layout", info["layout"])]
    rows.append(("runs", "yes" if info["runs"] else f"no: {info['why_not']}"))
    for file in info["files"]:
        rows.append(("file", f"{file['path']}  {file['bytes']:,} bytes  {file['kind']}"))
        if file.get("sha256"):
            known = f", the published {file['published']}" if file["published"] else ""
            rows.append(("", f"SHA-256 {file['sha256']}{known}"))
    for name, part in info["parts"].items():
        dtypes = ", ".join(part["dtypes"])
        rows.append((_LABELS[name], f"{part['tensors']} tensors  {part['parameters']:,} parameters  {dtypes}"))
    rows.append(("EMA", info["ema"] or "no averaged weights beside others"))
    rows += [("prediction", info["prediction"])] if "prediction" in info else []
    if "not_finite" in info:
        bad = info["not_finite"]
        rows.append(("values", f"NaN or infinite in {_some(bad)}" if bad else "all finite"))
    for label, key in (("damaged", "damaged"), ("ignored", "ignored"), ("not run", "foreign")):
        rows += [(label, _some(info[key]))] if info.get(key) else []
    for label, key in (("licence", "licence"), ("commit", "revision")):
        rows += [(label, info[key])] if info[key] else []
    if info["record"]:
        rows.append(("written by", f"sd_jax {info['record'].get('version')} from {info['record'].get('source')}"))
    if "probe" in info:
        rows.append(("probe", _probe_text(info["probe"])))
    if tensors:
        rows += [(name, f"{t['shape']} {t['dtype']}") for name, t in info["tensors"].items()]
    width = max(len(label) for label, _ in rows[: len(rows) - (len(info["tensors"]) if tensors else 0)])
    return "\n".join([info["path"], *(f"  {label:{width}}  {text}".rstrip() for label, text in rows)])


def _probe_text(found: Mapping[str, Any]) -> str:
    if found["same"] is None:
        return "it computes, and no earlier probe is recorded with it to compare with"
    if found["same"]:
        return f"it computes what was recorded with it (off by {found['off']:.1g} of the spread at most)"
    return f"NOT what was recorded with it: {found['worst']} is off by {found['off']:.2g} of its spread"


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
