"""diffusers-Flax' own files (``diffusion_flax_model.msgpack``, ``flax_model.msgpack``; written until diffusers 0.39).

They name the same modules as diffusers' torch files, with Flax' words for the leaves and Flax' axes.
"""

from __future__ import annotations

import re
from pathlib import Path

import flax.serialization
import flax.traverse_util
import numpy as np

from sd_jax.types import WeightsError
from sd_jax.weights.parameters import Held

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
_INDEX = re.compile(r"(?<!linear)_(\d+)(?=\.)")  # resnets_0 -> resnets.0; torch too says linear_1


def open_flax(path: Path) -> dict[str, Held]:
    """Tensors under diffusers' torch names and axes. The whole file is read. Raises WeightsError."""
    try:
        tree = flax.serialization.msgpack_restore(path.read_bytes())
        flat = flax.traverse_util.flatten_dict(tree, sep=".")
        return {_name(name): Held(_axes(name, array)) for name, array in flat.items()}
    except OSError as e:
        raise WeightsError(f"{path} cannot be read ({e.strerror}); check its permissions") from None
    # flatten_dict asserts that it is given a dictionary.
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, IndexError, RecursionError) as e:
        raise WeightsError(f"{path} is not a Flax checkpoint ({type(e).__name__}); fetch it again") from None


def _name(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    return _INDEX.sub(r".\1", module + ".") + _LEAVES.get(leaf, leaf)


def _axes(name: str, array: np.ndarray) -> np.ndarray:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} is no array")
    if name.endswith(".kernel"):
        return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    return array
