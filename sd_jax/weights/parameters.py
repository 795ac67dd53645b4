"""The two-sided check: every parameter has its tensor, every tensor its parameter, in shapes and dtypes that fit.

Nothing is read before the whole checkpoint has passed; what does not fit is reported at once, not one name a run.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import flax.traverse_util
import jax.numpy as jnp
import numpy as np

from sd_jax.config import SDConfig
from sd_jax.types import Params, RequestError, WeightsError
from sd_jax.weights.mapped import ahead
from sd_jax.weights.tables import COMPONENTS, PREFIXES, SAME, Row, Shape, Transform, parameter_shapes
from sd_jax.weights.torch_pickle import short

DTYPES = ("float32", "bfloat16", "float16")
_BLOCK = 128  # elements
_PART = 1 << 20  # elements that are looked at together where that takes memory
MANY_EMA = 100  # more keys than this under model_ema. mean that the averaged weights are there
NEAREST = 40  # missing names for which a near one is looked up, a second for all of them at worst
AMONG = 1000  # names; among more, none is


class Tensor(Protocol):
    """A tensor that lies in a file or in memory."""

    @property
    def dtype(self) -> np.dtype: ...

    @property
    def shape(self) -> Shape: ...

    def read(self) -> np.ndarray: ...

    def forget(self) -> None:
        """It may leave memory: what ``read`` gave was used, or copied."""


@dataclasses.dataclass(frozen=True)
class Held:
    """A Tensor in memory, of NumPy's or of JAX."""

    array: Any

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.array.dtype)

    @property
    def shape(self) -> Shape:
        return tuple(self.array.shape)

    def read(self) -> np.ndarray:
        return np.asarray(self.array)

    def forget(self) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One of our parameters, and the tensor and transform it will come from."""

    path: str
    shape: Shape
    tensor: Tensor
    transform: Transform

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.tensor.dtype)

    def read(self, dtype: Any = None, *, finite: bool = True) -> np.ndarray:
        """The values in our axes, C-ordered, cast to ``dtype`` (kept where None). No part of the file stays in memory.

        Raises WeightsError where a value is not finite (unless that was looked at before, ``finite`` False), or not any
        more after the cast.
        """
        array = self.transform.to_ours(self.tensor.read())
        if finite and not _finite(array):
            raise WeightsError(f"{self.path} has NaN or infinite values; the file is damaged, get it again")
        dtype = array.dtype if dtype is None else dtype_of(dtype)
        with np.errstate(over="ignore"):
            cast = ordered(array, dtype)
        narrower = cast.dtype != array.dtype and cast.dtype.itemsize <= array.dtype.itemsize
        if finite and narrower and not _finite(cast):
            raise WeightsError(f"{self.path} has values beyond the range of {dtype}; use float32 or bfloat16")
        if not cast.flags.owndata:
            cast = cast.copy()
        self.tensor.forget()
        return cast


def dtype_of(name: Any) -> np.dtype:
    """A dtype that weights may be kept in. Raises RequestError for any other."""
    try:
        dtype = np.dtype(jnp.dtype(name))
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in DTYPES:
        raise RequestError(f"dtype {name!r} is not one that weights are kept in; use {', '.join(DTYPES)}")
    return dtype


def to_parameters(config: SDConfig, params: Mapping[str, Any]) -> dict[str, Parameter]:
    """Our own parameters by path, nested or flat, of arrays or Tensors -> checked Parameters.

    Raises WeightsError with all that does not fit.
    """
    flat = {
        path: leaf if hasattr(leaf, "read") else Held(leaf)
        for path, leaf in flax.traverse_util.flatten_dict(dict(params), sep="/").items()
    }
    if all(isinstance(leaf, Parameter) for leaf in flat.values()):
        return dict(flat)
    parameters, problems = match(own_rows(config), config, flat)
    complain("the parameters", problems)
    return parameters


def to_params(
    parameters: Mapping[str, Parameter],
    dtype: Any = None,
    place: Callable[[str, np.ndarray], Any] | None = None,
    *,
    finite: bool = True,
) -> Params:
    """Read all -> nested params. ``place(path, array)`` puts each array where it belongs (a device, say), in order;
    the next few are read meanwhile. ``finite``: see ``Parameter.read``.
    """
    put = place or (lambda _, array: array)
    arrays = ahead(lambda parameter: parameter.read(dtype, finite=finite), parameters.values())
    return flax.traverse_util.unflatten_dict(
        {path: put(path, array) for path, array in zip(parameters, arrays, strict=True)}, sep="/"
    )


def own_rows(config: SDConfig) -> dict[str, Row]:
    """The rows for ``match`` where tensors have our own names and axes."""
    paths = [f"{component}/{path}" for component in COMPONENTS for path in parameter_shapes(config)[component]]
    return {path: Row((path,), path.partition("/")[2], SAME) for path in paths}


def set_aside(tensors: Mapping[str, Tensor], patterns: Iterable[str]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """-> (the tensors without those whose whole name matches a pattern, as they are no parameters; their names)."""
    skip = re.compile("|".join(f"(?:{pattern})" for pattern in patterns))
    aside = {name: None for name in tensors if skip.fullmatch(name)}
    return {name: tensor for name, tensor in tensors.items() if name not in aside}, tuple(aside)


def choose_ema(
    path: Any, rows: Mapping[str, Row], tensors: Mapping[str, Tensor], ema: bool | None
) -> tuple[dict[str, Row], dict[str, Tensor], bool | None]:
    """CompVis keeps the averaged UNet as model_ema.<name without dots>. -> (rows, tensors, which, if both exist)."""
    averaged = {name for name in tensors if name.startswith("model_ema.")}
    there = len(averaged) > MANY_EMA
    if ema is True and not there:
        raise WeightsError(f"{path} has no averaged (EMA) weights beside its own; leave ema out")
    plain = {name: tensor for name, tensor in tensors.items() if name not in averaged}
    if not there:
        return dict(rows), plain, None
    if ema is False:
        return dict(rows), plain, False

    def of_ema(name: str) -> str:
        return "model_ema." + name.removeprefix("model.").replace(".", "")

    chosen = {
        path: dataclasses.replace(row, names=tuple(map(of_ema, row.names)))
        for path, row in rows.items()
        if path.startswith("unet/")
    }
    others = {name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIXES["unet"])}
    return {**rows, **chosen}, others, True


def match(
    rows: Mapping[str, Row], config: SDConfig, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Parameter], list[str]]:
    """``rows`` by our full path ("unet/conv_in/kernel") and a file's tensors -> (parameters, what does not fit)."""
    shapes = parameter_shapes(config)
    parameters, missing, problems, left = {}, [], [], dict(tensors)
    for path, row in rows.items():
        component, _, inner = path.partition("/")
        name = next((name for name in row.names if name in left), None)
        if name is None:
            missing.append(row.names[0])
            continue
        tensor, ours = left.pop(name), shapes[component][inner]
        if not row.transform.reads(tuple(tensor.shape), ours):
            expected = row.transform.shape(ours)
            problems.append(f"shape    {name} is {list(tensor.shape)} where {list(expected)} is expected")
        if np.dtype(tensor.dtype).name not in DTYPES:
            problems.append(f"dtype    {name} is {np.dtype(tensor.dtype)}; {', '.join(DTYPES)} are read")
        parameters[path] = Parameter(path, ours, tensor, row.transform)
    for i, name in enumerate(missing):
        near = difflib.get_close_matches(name, left, 1, 0.8) if i < NEAREST and len(left) <= AMONG else []
        problems.append(f"missing  {name}" + (f" (nearest: {short(near[0])})" if near else ""))
    problems += [f"extra    {short(name)} {list(tensor.shape)}" for name, tensor in left.items()]
    return parameters, problems


def complain(where: str, problems: list[str]) -> None:
    """Raises WeightsError with a table of all the problems, if there are any."""
    if problems:
        kinds = [problem.split()[0] for problem in problems]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
        raise WeightsError(
            f"{where} does not fit the model ({counts}); use weights of Stable Diffusion v1, or give their config:"
            + "".join(f"\n  {problem}" for problem in sorted(problems))
        )


def ordered(array: np.ndarray, dtype: Any = None) -> np.ndarray:
    """The same values C-ordered in ``dtype``, without a copy where they are so already.

    A transposed matrix is copied in blocks of the last two axes, so that both sides stay in a core's cache: twice as
    fast as NumPy's own copy.
    """
    dtype = array.dtype if dtype is None else dtype
    if array.flags.c_contiguous:
        return array.astype(dtype, copy=False)
    out = np.empty(array.shape, dtype)
    rows, columns = (range(0, size, _BLOCK) for size in array.shape[-2:])
    for i, j in itertools.product(rows, columns):
        block = (..., slice(i, i + _BLOCK), slice(j, j + _BLOCK))
        out[block] = array[block]
    return out


def not_finite(array: np.ndarray) -> int:
    """How many values are NaN or infinite, of any dtype."""
    if array.dtype.kind in "biu" or (array.dtype.name in DTYPES and _finite(array)):
        return 0
    flat, found = array.reshape(-1), 0
    for start in range(0, flat.size, _PART):
        part = flat[start : start + _PART]
        part = part if part.dtype.kind in "fc" else part.astype(np.float32)  # NumPy knows no bfloat16
        found += part.size - int(np.count_nonzero(np.isfinite(part)))
    return found


def _finite(array: np.ndarray) -> bool:
    """No NaN and no infinity. Half floats are looked at as integers, which NumPy compares many times faster."""
    if array.size == 0:
        return True
    if array.dtype.itemsize == 2:
        infinity = 0x7C00 if array.dtype == np.float16 else 0x7F80
        return int((array.view(np.uint16) & 0x7FFF).max()) < infinity
    return bool(np.isfinite(array.min()) and np.isfinite(array.max()))
