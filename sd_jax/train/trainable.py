"""Which parameters a run changes: nested parameters in two parts, and back."""

from __future__ import annotations

import re
from collections.abc import Sequence

import flax.traverse_util

from sd_jax.types import Params, RequestError


def split(params: Params, patterns: Sequence[str]) -> tuple[Params, Params]:
    """-> (trainable, frozen), nested like ``params``.

    Trainable is what a pattern, a regular expression, matches from the beginning of its path: "" all, "unet/" the UNet,
    "unet/.*/cross_attn/[kv]/" what reads the context. Raises RequestError for a pattern that matches nothing.
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    for pattern in patterns:
        if not any(re.match(pattern, path) for path in flat):
            raise RequestError(f"trainable {pattern!r} matches no parameter; there are {', '.join(list(flat)[:3])} ...")
    chosen = {path for path in flat if any(re.match(pattern, path) for pattern in patterns)}
    if not chosen:
        raise RequestError("trainable is empty: nothing would be trained; leave it out to train everything")
    return tuple(
        flax.traverse_util.unflatten_dict({p: flat[p] for p in flat if (p in chosen) == part}, sep="/")
        for part in (True, False)
    )


def merge(trainable: Params, frozen: Params) -> Params:
    """The inverse of ``split``."""
    flat = [flax.traverse_util.flatten_dict(part, sep="/") for part in (frozen, trainable)]
    return flax.traverse_util.unflatten_dict(flat[0] | flat[1], sep="/")
