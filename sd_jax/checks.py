"""What a request's arguments are checked for before anything is compiled; each raises RequestError in one sentence."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sd_jax.types import RequestError


def side(name: str, value: int, factor: int) -> None:
    """Raises RequestError unless ``value`` is a positive multiple of ``factor``, naming the two nearest that are."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise RequestError(f"{name} {value!r} is not a whole number of pixels; give a multiple of {factor}")
    if value <= 0 or value % factor:
        low = max(factor, value // factor * factor)
        nearest = f"use {low}" if value <= low else f"use {low} or {low + factor}"
        raise RequestError(f"{name} {value} is not a multiple of {factor}; {nearest}")


def listed(values: Any, name: str) -> list:
    """One text, or a sequence of whatever it is, as a list."""
    if isinstance(values, str):
        return [values]
    if not isinstance(values, Sequence | np.ndarray) or isinstance(values, bytes) or not len(values):
        raise RequestError(f"{name} are {values!r}; give a list of at least one")
    return list(values)


def spread(values: list, b: int, name: str) -> list:
    """``values`` for ``b`` pictures: one for each, or the same for all."""
    if len(values) not in (1, b):
        raise RequestError(f"there are {len(values)} {name} and {b} pictures to make; give one, or one for each")
    return values * b if len(values) == 1 else values


def numbers(value: Any, b: int, name: str, low: float, high: float) -> np.ndarray:
    """float32 [b] of a number, or of one for each picture."""
    try:
        values = np.atleast_1d(np.asarray(value, np.float32))
    except (TypeError, ValueError):
        values = np.array([np.nan])
    if values.ndim != 1 or not np.isfinite(values).all() or (values < low).any() or (values > high).any():
        limits = "a finite number" if low == -math.inf else f"a number from {low:g} to {high:g}"
        raise RequestError(f"{name} {value} is not usable; give {limits}, or one for each picture")
    return np.asarray(spread(list(values), b, f"values of {name}"), np.float32)


def stack(values: np.ndarray, b: int, name: str) -> np.ndarray:
    """[1, ...] or [b, ...] -> [b, ...]."""
    return np.stack(spread(list(values), b, name))


def as_masks(masks: np.ndarray) -> np.ndarray:
    """One mask or a batch -> bool [B, H, W]."""
    masks = np.asarray(masks)
    masks = masks[None] if masks.ndim == 2 else masks
    if masks.ndim != 3 or masks.dtype not in (np.uint8, np.bool_):
        raise RequestError(
            f"masks are {masks.dtype} {list(masks.shape)}; give uint8 or bool [height, width] or a batch of them"
        )
    return masks.astype(bool)


def as_latents(latents: Any, b: int, factor: int, channels: int, size: tuple[int, int] | None) -> np.ndarray:
    """float32 [b, h, w, channels]; ``size`` is (height, width) of the pictures to make, None where latents decide."""
    latents = np.asarray(latents, np.float32)
    given = tuple(factor * side for side in latents.shape[1:3])
    if latents.ndim != 4 or len(latents) != b or latents.shape[-1] != channels or size not in (None, given):
        height, width = (f"height/{factor}", f"width/{factor}") if size is None else (side // factor for side in size)
        raise RequestError(f"latents are {list(latents.shape)}; give [{b}, {height}, {width}, {channels}]")
    return latents


def as_images(images: Any, factor: int, *, floats: bool = False) -> np.ndarray:
    """One picture or a batch, uint8 (or whatever it is where ``floats`` are known to be) -> [B, H, W, 3], with sides
    that are multiples of ``factor``.
    """
    images = np.asarray(images)
    images = images[None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[-1] != 3 or not (floats or images.dtype == np.uint8):
        raise RequestError(
            f"images are {images.dtype} {list(images.shape)}; give uint8 [height, width, 3] or a batch of them"
        )
    side("image height", images.shape[1], factor)
    side("image width", images.shape[2], factor)
    return images


def as_folder(path: str | Path) -> Path:
    """``path``, made if need be, and tried out by writing a file."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = "it, or a part of its path, is a file" if _in_the_way(path) else getattr(error, "strerror", error)
        raise RequestError(f"nothing can be written to the folder {str(path)!r}: {reason}; choose another") from error
    return path


def _in_the_way(path: Path) -> bool:
    return any(os.path.isfile(part) for part in (path, *path.parents) if "\0" not in str(part))
