"""diffusers-Flax' own files (``diffusion_flax_model.msgpack``, ``flax_model.msgpack``; written until diffusers 0.39).

They name the same modules as diffusers' torch files, with Flax' words for the leaves and Flax' axes.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import flax.serialization
import flax.traverse_util
import numpy as np

from sd_jax.types import WeightsError

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
_INDEX = re.compile(r"(?<!linear)_(\d+)(?=\.)")  # resnets_0 -> resnets.0; torch too says linear_1


@dataclasses.dataclass(frozen=True)
class FlaxTensor:
    """A tensor in memory, with torch's axes for a view."""

    array: np.ndarray

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def read(self) -> np.ndarray:
        return self.array


def open_flax(path: Path) -> dict[str, FlaxTensor]:
    """Tensors under diffusers' torch names and axes. The whole file is read. Raises WeightsError."""
    try:
        tree = flax.serialization.msgpack_restore(path.read_bytes())
        flat = flax.traverse_util.flatten_dict(tree, sep=".")
        return {_name(name): FlaxTensor(_axes(name, array)) for name, array in flat.items()}
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as e:
        raise WeightsError(f"{path} is not a Flax checkpoint ({type(e).__name__}); fetch it again") from None


def _name(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    return _INDEX.sub(r".\1", module + ".") + _LEAVES.get(leaf, leaf)


def _axes(name: str, array: np.ndarray) -> np.ndarray:
    if name.endswith(".kernel"):
        return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    return array
