"""What the files that sd_jax writes say of themselves: their config, their tokenizer, and how they were made."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sd_jax.config import SD_V1_4, CLIPConfig, NoiseConfig, SDConfig, UNetConfig, VAEConfig, checked
from sd_jax.tokenizer import Tokenizer
from sd_jax.types import WeightsError
from sd_jax.weights.files import WeightFile, read_json
from sd_jax.weights.tables import COMPONENTS
from sd_jax.weights.torch_pickle import quoting

NATIVE = "sd_jax"  # metadata "format" of our own files, and the key of the record of how they were made
LICENCE = "CreativeML OpenRAIL-M"
LICENCE_LINK = "https://huggingface.co/spaces/CompVis/stable-diffusion-license"
RECORD = "sd_jax.json"  # that record in a folder


def licence_of(config: SDConfig) -> str | None:
    """That of the released v1 weights, for weights of their shape."""
    return LICENCE if config.unet.widths == SD_V1_4.unet.widths else None


def own_config(path: Path, file: WeightFile) -> SDConfig | None:
    """The config in a file that sd_jax wrote."""
    if "config" not in file.metadata and file.metadata.get("format") != NATIVE:
        return None
    return from_metadata(path, lambda: config_from_dict(json.loads(file.metadata["config"])))


def own_record(path: Path, file: WeightFile) -> dict[str, Any] | None:
    """What sd_jax noted when it wrote a file; see ``convert``."""
    if NATIVE not in file.metadata:
        return None
    return from_metadata(path, lambda: checked_record(json.loads(file.metadata[NATIVE])))


def folder_record(folder: Path) -> dict[str, Any] | None:
    """The same of a folder."""
    path = folder / RECORD
    return from_metadata(path, lambda: checked_record(read_json(path))) if path.is_file() else None


def checked_record(value: Any) -> dict[str, Any]:
    """The record, its texts fit to be shown. Raises TypeError or ValueError where it is none, or its probe none."""
    if not isinstance(value, dict):
        raise TypeError("its record is no object")
    for numbers in value.get("probe", {}).values():
        if not isinstance(numbers, list) or not all(x is None or type(x) is float for x in numbers):
            raise ValueError("its probe holds something else than numbers")
    return {name: quoting(field) if isinstance(field, str) else field for name, field in value.items()}


def from_metadata(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as e:
        raise WeightsError(
            f"{path} has a config, tokenizer or record in it that cannot be used ({quoting(str(e))}); convert it again"
        ) from None


def config_from_dict(values: dict[str, Any]) -> SDConfig:
    """The inverse of ``dataclasses.asdict``, through JSON. Raises KeyError, TypeError and ValueError."""

    def make(kind: type, fields: dict[str, Any]) -> Any:
        if any(isinstance(v, str) and not v.isprintable() for v in fields.values()):
            raise ValueError("a text in its config cannot be printed")
        return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()})

    parts = {"clip": CLIPConfig, "unet": UNetConfig, "vae": VAEConfig, "noise": NoiseConfig}
    return SDConfig(**{name: checked(name, make(parts[name], fields)) for name, fields in values.items()})


def tokenizer_from_dict(values: dict[str, Any]) -> Tokenizer:
    """The inverse of ``tokenizer_to_dict``."""
    vocab = {token: i for i, token in enumerate(values["vocab"])}
    return Tokenizer(
        vocab, tuple(tuple(merge.split(" ")) for merge in values["merges"]), values["pad"], tuple(values["words"])
    )


def tokenizer_to_dict(tokenizer: Tokenizer) -> dict[str, Any]:
    """A JSON form: tokens in order of their ids, merges in order of priority."""
    tokens = sorted(tokenizer.vocab, key=tokenizer.vocab.__getitem__)
    merges = [" ".join(merge) for merge in tokenizer.merges]
    return {"vocab": tokens, "merges": merges, "pad": tokenizer.pad, "words": list(tokenizer.words)}


def differences(config: SDConfig, own: SDConfig, parts: Sequence[str] = COMPONENTS) -> str:
    """Where two models' networks differ, in words. How they are sampled is not among ``parts``, and may."""
    pairs = [(part, getattr(config, part), getattr(own, part)) for part in parts]
    return ", ".join(
        f"{part}.{field.name} {getattr(one, field.name)} not {getattr(other, field.name)}"
        for part, one, other in pairs
        for field in dataclasses.fields(one)
        if getattr(one, field.name) != getattr(other, field.name)
    )
