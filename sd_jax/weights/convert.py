"""Models from one layout to another, tensor by tensor: no more than one is in memory at a time."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sd_jax.config import SDConfig, to_diffusers
from sd_jax.tokenizer import Tokenizer
from sd_jax.types import RequestError
from sd_jax.weights.parameters import Parameter, dtype_of, ordered, to_parameters
from sd_jax.weights.safetensors_file import replacing, write_safetensors
from sd_jax.weights.source import FOLDERS, NATIVE, Report, open_source, tokenizer_to_dict
from sd_jax.weights.tables import COMPONENTS, table

TO = ("diffusers", "compvis", "native")


def convert(
    source: str | Path,
    dest: str | Path,
    *,
    to: str = "native",
    dtype: Any = None,
    revision: str | None = None,
    ema: bool | None = None,
    tokenizer: Tokenizer | str | Path | None = None,
    config: SDConfig | str | Path | None = None,
    overwrite: bool = False,
) -> Report:
    """Write the model ``source`` (see ``open_source``) as ``dest``: a folder for "diffusers", else a safetensors file.

    ``dtype`` None keeps every tensor's own. The result appears under its name only when it is whole. A safety checker
    is left behind. Raises RequestError and WeightsError.
    """
    if to not in TO:
        raise RequestError(f"to {to!r} is not a layout that is written; use one of {', '.join(TO)}")
    dtype = None if dtype is None else dtype_of(dtype)
    opened = open_source(source, revision=revision, ema=ema, tokenizer=tokenizer, config=config)
    if to == "compvis":
        write_compvis(dest, opened.config, opened.parameters, dtype=dtype, overwrite=overwrite)
    else:
        write = write_native if to == "native" else write_diffusers
        write(dest, opened.config, opened.parameters, opened.tokenizer, dtype=dtype, overwrite=overwrite)
    return opened.report


def write_native(
    path: str | Path,
    config: SDConfig,
    params: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    dtype: Any = None,
    overwrite: bool = False,
) -> None:
    """One safetensors file that is the whole model: parameters by path, config and tokenizer in the metadata.

    ``params`` are nested (of NumPy's or JAX arrays), or ``Source.parameters``. Raises RequestError and WeightsError.
    """
    tokenizer.check(config.clip.vocab_size)
    parameters = to_parameters(config, params)
    dtypes = {path: parameter.dtype if dtype is None else dtype_of(dtype) for path, parameter in parameters.items()}
    metadata = {
        "format": NATIVE,
        "config": json.dumps(dataclasses.asdict(config)),
        "tokenizer": json.dumps(tokenizer_to_dict(tokenizer), ensure_ascii=False),
    }
    entries = [(path, p.shape, dtypes[path], _reader(p, dtypes[path])) for path, p in parameters.items()]
    write_safetensors(path, entries, metadata, overwrite=overwrite)


def write_compvis(
    path: str | Path, config: SDConfig, params: Mapping[str, Any], *, dtype: Any = None, overwrite: bool = False
) -> None:
    """The single-file layout of CompVis/stable-diffusion, which holds no config and no tokenizer."""
    parameters = to_parameters(config, params)
    entries = [entry for c in COMPONENTS for entry in _theirs("compvis", c, config, parameters, dtype)]
    write_safetensors(path, entries, {"format": "pt"}, overwrite=overwrite)


def write_diffusers(
    folder: str | Path,
    config: SDConfig,
    params: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    dtype: Any = None,
    overwrite: bool = False,
) -> None:
    """A folder that diffusers' StableDiffusionPipeline opens too. ``overwrite`` replaces only a folder of that kind."""
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
