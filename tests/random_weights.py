"""Random weights that every machine makes alike, from a seed and a parameter's name.

The initialisers of a framework set biases to zero and norm scales to one, which hides a forgotten bias or a swapped
scale. Here every tensor is random, and scaled so that activations stay of order one.
"""

import hashlib
import math

import flax.linen as nn
import jax
import numpy as np

from sd_jax.config import SDConfig
from sd_jax.types import Params
from sd_jax.weights.parameters import Held, complain, match, to_params
from sd_jax.weights.tables import parameter_shapes, table


def noise(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """float32, uniform with mean 0 and variance 1. The bits are PCG64's own, which NumPy promises never to change;
    its normal distribution carries no such promise.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    bits = np.random.PCG64(int.from_bytes(digest[:16], "little")).random_raw(-(-math.prod(shape) // 2))
    bits = bits.astype("<u8", copy=False).view("<u4")[: math.prod(shape)].reshape(shape)
    out = bits.astype(np.float32)
    out *= np.float32(math.sqrt(12) / 2**32)
    out -= np.float32(math.sqrt(3))
    return out


def torch_tensor(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """The parameter that a torch checkpoint calls ``name``; matrices and kernels are [out, in, ...] there."""
    out = noise(name, shape, seed)
    if len(shape) > 1:
        out *= np.float32(math.prod(shape[1:]) ** -0.5)
        return out
    out *= np.float32(0.1)
    return out + np.float32(1) if name.endswith("weight") else out


def params_like(module: nn.Module, *args, seed: int = 0) -> Params:
    """Parameters of a linen module, as ``module.init(key, *args)["params"]`` would shape them."""
    abstract = jax.eval_shape(module.init, jax.random.key(0), *args)["params"]

    def draw(path, leaf):
        name = "/".join(p.key for p in path)
        out = noise(name, leaf.shape, seed)
        match path[-1].key:
            case "kernel":
                return out * np.float32(math.prod(leaf.shape[:-1]) ** -0.5)
            case "embedding":
                return out * np.float32(leaf.shape[-1] ** -0.5)
            case "scale":
                return 1 + np.float32(0.1) * out
            case "bias":
                return np.float32(0.1) * out
        raise ValueError(f"no rule for {name}")

    return jax.tree_util.tree_map_with_path(draw, abstract)


def checkpoint(component: str, config: SDConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """The tensors of one component ("clip", "unet" or "vae") under torch's names, as diffusers 0.42 has them."""
    shapes = parameter_shapes(config)[component]
    tensors = {}
    for row in table("diffusers", component, config):
        name = row.names[0].removeprefix("text_model.")  # in the files of v1, but no longer in transformers' module
        tensors[name] = torch_tensor(name, row.transform.shape(shapes[row.path]), seed)
    return tensors


def our_params(component: str, config: SDConfig, tensors: dict[str, np.ndarray]) -> Params:
    """``checkpoint``'s tensors as our parameters, through the code that loads real files."""
    rows = {f"{component}/{row.path}": row for row in table("diffusers", component, config)}
    parameters, problems = match(rows, config, {name: Held(array) for name, array in tensors.items()})
    complain(component, problems)
    return to_params(parameters)[component]
