"""What a request's arguments are checked for before anything is compiled; each raises RequestError in one sentence."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from sd_jax.types import RequestError


def side(name: str, value: int, factor: int) -> None:
    """Raises RequestError unless ``value`` is a positive multiple of ``factor``, naming the two nearest that are."""
    if not isinstance(value, int | np.integer) or value <= 0 or value % factor:
        low = max(factor, int(value) // factor * factor)
        nearest = f"use {low}" if value <= low else f"use {low} or {low + factor}"
        raise RequestError(f"{name} {value} is not a multiple of {factor}; {nearest}")


def spread(values: list, b: int, name: str) -> list:
    if len(values) not in (1, b):
        raise RequestError(f"there are {len(values)} {name} for {b} images; give one, or one per image")
    return values * b if len(values) == 1 else values


def numbers(value: Any, b: int, name: str, low: float, high: float) -> np.ndarray:
    values = np.atleast_1d(np.asarray(value, np.float32))
    if values.ndim != 1 or not np.isfinite(values).all() or (values < low).any() or (values > high).any():
        limits = "a finite number" if low == -math.inf else f"a number from {low:g} to {high:g}"
        raise RequestError(f"{name} {value} is not usable; give {limits}, or one per image")
    return np.asarray(spread(list(values), b, f"values of {name}"), np.float32)


def stack(values: np.ndarray, b: int, name: str) -> np.ndarray:
    return np.concatenate(spread([values], b, name)) if len(values) == 1 else np.stack(spread(list(values), b, name))


def as_masks(masks: np.ndarray) -> np.ndarray:
    masks = np.asarray(masks)
    masks = masks[None] if masks.ndim == 2 else masks
    if masks.ndim != 3 or masks.dtype not in (np.uint8, np.bool_):
        raise RequestError(
            f"masks are {masks.dtype} {list(masks.shape)}; give uint8 or bool [height, width] or a batch of them"
        )
    return masks.astype(bool)


def as_latents(latents: Any, b: int, channels: int) -> np.ndarray:
    latents = np.asarray(latents, np.float32)
    if latents.ndim != 4 or len(latents) != b or latents.shape[-1] != channels:
        raise RequestError(f"latents are {list(latents.shape)}; give [{b}, height/8, width/8, {channels}]")
    return latents


def as_images(images: Any, factor: int) -> np.ndarray:
    """One picture or a batch -> uint8 [B, H, W, 3], with sides that are multiples of ``factor``."""
    images = np.asarray(images)
    images = images[None] if images.ndim == 3 else images
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise RequestError(
            f"images are {images.dtype} {list(images.shape)}; give uint8 [height, width, 3] or a batch of them"
        )
    side("image height", images.shape[1], factor)
    side("image width", images.shape[2], factor)
    return images
