"""Models from one layout to another, tensor by tensor: no more than a few are in memory at a time."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sd_jax import __version__
from sd_jax.config import SDConfig, to_diffusers
from sd_jax.tokenizer import Tokenizer
from sd_jax.types import RequestError, WeightsError
from sd_jax.weights import sums
from sd_jax.weights.files import FOLDERS
from sd_jax.weights.metadata import LICENCE_LINK, NATIVE, RECORD, differences, licence_of, tokenizer_to_dict
from sd_jax.weights.parameters import Parameter, dtype_of, ordered, to_parameters
from sd_jax.weights.probe import CAST, SAME, VERSION, Probe, distance, probe, recorded_probe
from sd_jax.weights.safetensors_file import replacing, write_safetensors
from sd_jax.weights.source import Report, Source, open_source
from sd_jax.weights.tables import COMPONENTS, table

TO = ("diffusers", "compvis", "native")
NOTICE = "LICENSE_NOTICE.txt"

Record = Callable[[Path], Mapping[str, Any]]  # the model, whole but under a temporary name -> what is kept with it


def convert(
    source: str | Path,
    dest: str | Path,
    *,
    to: str = "native",
    dtype: Any = None,
    overwrite: bool = False,
    verify: bool = True,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Report:
    """Write the model ``source`` as ``dest``: a folder for "diffusers", else a safetensors file.

    ``options`` are those of ``open_source``. ``dtype`` None keeps every tensor's own. The result appears under its name
    only when it is whole, was opened again, and was found to be the same model: the same config, and, unless ``verify``
    is off, the numbers of a probe that an earlier conversion left with ``source``. A record with this probe is kept in
    the file's metadata or the folder's sd_jax.json. A safety checker is left behind. ``progress`` is told (tensors
    read, of all). Raises RequestError and WeightsError.
    """
    if to not in TO:
        raise RequestError(f"to {to!r} is not a layout that is written; use one of {', '.join(TO)}")
    dtype = None if dtype is None else dtype_of(dtype)
    opened = open_source(source, verify=verify, **options)

    def record(written: Path) -> Mapping[str, Any]:
        again = open_source(written, tokenizer=opened.tokenizer, verify=False)  # its bytes are still in memory
        if wrong := differences(again.config, opened.config, (*COMPONENTS, "noise")):
            raise WeightsError(f"{dest} would be another model than {source} ({wrong}); report this defect of sd_jax")
        return _record(opened, again, str(source), probe(again.config, again.parameters) if verify else None)

    parameters = opened.parameters if progress is None else _told(opened.parameters, progress)
    keywords = {"dtype": dtype, "overwrite": overwrite, "record": record}
    if to == "compvis":
        write_compvis(dest, opened.config, parameters, **keywords)
    else:
        write = write_native if to == "native" else write_diffusers
        write(dest, opened.config, parameters, opened.tokenizer, **keywords)
    return opened.report


@dataclasses.dataclass(frozen=True)
class _Told(Parameter):
    """A parameter whose reading is told of."""

    tell: Callable[[], None]

    def read(self, dtype: Any = None, *, finite: bool = True) -> np.ndarray:
        array = super().read(dtype, finite=finite)
        self.tell()
        return array


def _told(parameters: Mapping[str, Parameter], progress: Callable[[int, int], None]) -> dict[str, Parameter]:
    lock, done = threading.Lock(), 0

    def tell() -> None:
        nonlocal done
        with lock:  # several threads read
            done += 1
            progress(done, len(parameters))

    return {path: _Told(p.path, p.shape, p.tensor, p.transform, tell) for path, p in parameters.items()}


def _record(opened: Source, again: Source, source: str, found: Probe | None) -> dict[str, Any]:
    """What is kept with a conversion. Raises WeightsError where the source's own record has another probe."""
    recorded = None if opened.report.parts else recorded_probe(opened.record)  # parts from elsewhere give other numbers
    if found is not None and recorded is not None:
        kept = all(parameter.dtype == opened.parameters[path].dtype for path, parameter in again.parameters.items())
        name, off = distance(recorded, found)
        if not off <= (limit := SAME if kept else CAST):
            raise WeightsError(
                f"{source} does not compute what was recorded with it: {name} is off by {off:.2g} of its spread where "
                f"at most {limit:g} is expected; its heads, groups or epsilons were changed, give the config it had"
            )
    report = opened.report
    record = {
        "version": __version__,
        "source": Path(source).name if os.path.exists(source) else source,
        "layout": report.layout,
        "revision": report.revision,
        "ema": report.ema,
        "parts": {component: Path(part).name if os.path.exists(part) else part for component, part in report.parts},
        "licence": opened.licence,
        "probe_version": VERSION,
        "probe": found,
    }
    return {name: value for name, value in record.items() if value not in (None, {})}


def write_native(
    path: str | Path,
    config: SDConfig,
    params: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    dtype: Any = None,
    overwrite: bool = False,
    record: Record | None = None,
) -> None:
    """One safetensors file that is the whole model: parameters by path, config and tokenizer in the metadata.

    ``params`` are nested (of NumPy's or JAX arrays), or ``Source.parameters``. Raises RequestError and WeightsError.
    """
    tokenizer.check(config.clip.vocab_size)
    parameters = to_parameters(config, params)
    dtypes = {path: parameter.dtype if dtype is None else dtype_of(dtype) for path, parameter in parameters.items()}
    metadata = _metadata(NATIVE, config)
    metadata["tokenizer"] = json.dumps(tokenizer_to_dict(tokenizer), ensure_ascii=False)
    entries = [(path, p.shape, dtypes[path], _reader(p, dtypes[path])) for path, p in parameters.items()]
    write_safetensors(path, entries, metadata, overwrite=overwrite, complete=_in_metadata(record))


def write_compvis(
    path: str | Path,
    config: SDConfig,
    params: Mapping[str, Any],
    *,
    dtype: Any = None,
    overwrite: bool = False,
    record: Record | None = None,
) -> None:
    """The single-file layout of CompVis/stable-diffusion. It holds no tokenizer; our config is in its metadata, where
    other programs do not look for one.
    """
    parameters = to_parameters(config, params)
    entries = [entry for c in COMPONENTS for entry in _theirs("compvis", c, config, parameters, dtype)]
    metadata = _metadata("pt", config)
    write_safetensors(path, entries, metadata, overwrite=overwrite, complete=_in_metadata(record))


def write_diffusers(
    folder: str | Path,
    config: SDConfig,
    params: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    dtype: Any = None,
    overwrite: bool = False,
    record: Record | None = None,
) -> None:
    """A folder that diffusers' StableDiffusionPipeline opens too, with a list of its files' SHA-256.

    ``overwrite`` replaces only a folder of that kind.
    """
    if overwrite and os.path.lexists(folder) and not (Path(folder) / "model_index.json").is_file():
        raise RequestError(f"{folder} is there already and is no diffusers folder; choose another name or remove it")
    tokenizer.check(config.clip.vocab_size)
    parameters = to_parameters(config, params)
    jsons = to_diffusers(config)
    least = 2 * sum(math.prod(p.shape) for p in parameters.values())  # bytes, in half floats
    with replacing(folder, overwrite=overwrite, size=least) as temporary:
        temporary.mkdir()
        for component, name in FOLDERS.items():
            (temporary / name).mkdir()
            _write_json(temporary / name / "config.json", jsons[name])
            stem = "model" if component == "clip" else "diffusion_pytorch_model"
            entries = _theirs("diffusers", component, config, parameters, dtype)
            write_safetensors(temporary / name / f"{stem}.safetensors", entries, {"format": "pt"})
        (temporary / "scheduler").mkdir()
        _write_json(temporary / "scheduler" / "scheduler_config.json", jsons["scheduler"])
        _write_json(temporary / "model_index.json", _model_index(jsons))
        tokenizer.save(temporary / "tokenizer")
        if (licence := licence_of(config)) is not None:
            (temporary / NOTICE).write_text(_notice(licence), encoding="utf-8")
        if record is not None:
            _write_json(temporary / RECORD, record(temporary))
        names = sorted(path.relative_to(temporary).as_posix() for path in temporary.rglob("*") if path.is_file())
        sums.write(temporary / sums.NAME, sums.to_text(sums.digests(temporary, names)))


def _metadata(kind: str, config: SDConfig) -> dict[str, str]:
    own = {"format": kind, "config": json.dumps(dataclasses.asdict(config))}
    licence = licence_of(config)
    return own if licence is None else own | {"license": licence, "license_link": LICENCE_LINK}


def _in_metadata(record: Record | None) -> Callable[[Path], dict[str, str]] | None:
    return None if record is None else lambda path: {NATIVE: json.dumps(record(path))}


def _notice(licence: str) -> str:
    return (
        f"These weights have the shape of Stable Diffusion v1. The released ones, and whatever is made from them, are\n"
        f"under the {licence} licence:\n\n    {LICENCE_LINK}\n\n"
        "Its use restrictions (Attachment A) bind everyone who uses the weights. Whoever passes them on, changed or\n"
        "not, has to pass on the licence, bind the receivers to the same restrictions, and say what was changed.\n\n"
        f"This copy was written by sd_jax {__version__}; {RECORD}, where it is there, says from what.\n"
    )


def _theirs(
    layout: str, component: str, config: SDConfig, parameters: Mapping[str, Parameter], dtype: Any
) -> Iterator[tuple[str, tuple[int, ...], np.dtype, Any]]:
    """A component under another layout's names and axes, as ``write_safetensors`` takes it."""
    for row in table(layout, component, config):
        parameter = parameters[f"{component}/{row.path}"]
        kept = parameter.dtype if dtype is None else dtype_of(dtype)
        yield (
            row.names[0],
            row.transform.shape(parameter.shape),
            kept,
            _reader(parameter, kept, row.transform.to_theirs),
        )


def _reader(parameter: Parameter, dtype: np.dtype, transform=lambda array: array):
    return lambda: ordered(transform(parameter.read(dtype)))


def _model_index(jsons: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": jsons["unet"]["_diffusers_version"],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", jsons["scheduler"]["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
