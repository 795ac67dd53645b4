"""Random draws that belong to an image: its key, the step, and nothing else decide them.

``keys`` [B] are typed keys (``jax.random.key``, threefry), one per image. A draw is made image by image, in float32 and
in NHWC, so it is bit for bit the same in any batch, on any number of devices. Denoising step i draws from
``fold(keys, i)``; what is drawn outside the loop has a stream of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sd_jax.types import Array, RequestError

STARTING = 2**31 - 1  # stream of the noise that sampling starts from, out of the reach of any step number
POSTERIOR = 2**31 - 2  # stream of the noise that samples the autoencoder's posterior


def seed_words(seeds: Sequence[int]) -> np.ndarray:
    """Seeds 0 ... 2**63 - 1 -> uint32 [B, 2], high and low words: what a compiled program is given, in any x64 mode.

    Raises RequestError for one that is no such number.
    """
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**63:
            raise RequestError(f"seed {seed!r} is out of range; give a whole number from 0 to {2**63 - 1}")
    return np.array([(int(seed) >> 32, int(seed) & 0xFFFFFFFF) for seed in seeds], np.uint32).reshape(-1, 2)


def keys(words: Array) -> Array:
    """``seed_words`` [B, 2] -> keys [B]. A seed below 2**32 has the key ``jax.random.key(seed)``."""
    return jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")


def fold(keys: Array, data: Array | int) -> Array:
    """Each image's key of a step or stream: ``fold_in`` of the same number into every key."""
    return jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def draw(keys: Array, x: Array) -> Array:
    """Unit-normal noise of the shape of ``x`` [B, ...], float32."""
    return jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], jnp.float32))(keys)


def starting_noise(keys: Array, shape: tuple[int, ...]) -> Array:
    """The unit-normal noise [B, *shape] that each image starts from; ``shape`` is (h, w, C). float32."""
    return draw(fold(keys, STARTING), jax.ShapeDtypeStruct((keys.shape[0], *shape), jnp.float32))
