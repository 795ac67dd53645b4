"""Examples for training: any batch of a run at any time, and the arrays they are taken from, kept on disk.

A batch is a function of the seed and the step alone, so resuming a run or giving it other devices changes nothing.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sd_jax.images import from_uint8
from sd_jax.pipeline import SD
from sd_jax.tokenizer import Tokenizer
from sd_jax.train import scenes
from sd_jax.train.config import DataConfig
from sd_jax.types import Params, RequestError

CHUNK = 512  # examples that are made, and kept, at a time
_SAMPLED = 499  # of so many pictures one is looked at, to tell two sets of them apart
_DROPOUT = 1  # stream of its own beside the permutations'


class Interrupted(Exception):
    """The ``stop`` that a long job was given says so; what is finished is kept."""


def never() -> bool:
    return False


# ---- batches -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """N examples as arrays [N, ...] by name, read epoch by epoch, each epoch in an order of its own.

    With ``empty``, this share of the "tokens" in a batch are replaced: ``dropout``, decided anew for each step.
    """

    arrays: Mapping[str, np.ndarray]
    batch_size: int
    seed: int
    dropout: float = 0.0
    empty: np.ndarray | None = None  # the tokens of the empty caption

    def ids(self, step: int) -> np.ndarray:
        """int64 [batch_size]: which examples step number ``step`` (from 0) is given. A batch may span epochs."""
        count = len(next(iter(self.arrays.values())))
        epochs, places = np.divmod(step * self.batch_size + np.arange(self.batch_size), count)
        orders = {epoch: _order(self.seed, int(epoch), count) for epoch in np.unique(epochs)}
        return np.array([orders[epoch][place] for epoch, place in zip(epochs, places, strict=True)])

    def batch(self, step: int) -> dict[str, np.ndarray]:
        ids = self.ids(step)
        batch = {name: array[ids] for name, array in self.arrays.items()}
        if self.empty is not None:
            drop = np.random.default_rng((self.seed, _DROPOUT, step)).random(self.batch_size) < self.dropout
            batch["tokens"] = np.where(drop[:, None], self.empty, batch["tokens"])
        return batch


@functools.lru_cache(2)  # of the epoch that ends and the one that begins
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(count)


# ---- arrays on disk ------------------------------------------------------------------------------------------------


def load_scenes(
    folder: str | Path,
    data: DataConfig,
    size: int,
    *,
    stop: Callable[[], bool] = never,
    log: Callable[[str], None] | None = None,
) -> tuple[np.ndarray, list[str]]:
    """Scenes as (uint8 [n, size, size, 3], mapped from the disk; captions), rendered into ``folder`` where missing.

    Rendering goes on where it was interrupted, by ``stop`` (which raises Interrupted) or otherwise.
    """
    folder = Path(folder) / f"scenes-{data.split}-{data.seed}-{data.scenes}-{size}"
    folder.mkdir(parents=True, exist_ok=True)
    captions = folder / "captions.txt"
    lines = captions.read_text().split("\n")[:-1] if captions.exists() else []
    done = len(lines) if len(lines) == data.scenes else len(lines) // CHUNK * CHUNK
    images = _open_array(folder / "images.npy", (data.scenes, size, size, 3), np.uint8, fresh=done == 0)
    starts = range(done, data.scenes, CHUNK)
    if starts:
        lines = lines[:done]
        replace_text(captions, "".join(f"{line}\n" for line in lines))
    jobs = [(min(CHUNK, data.scenes - start), data.seed, data.split, size, start) for start in starts]
    with captions.open("a") as file, _mapper(data.workers if len(jobs) > 1 else 1) as mapper:
        for start, (pictures, texts) in zip(starts, mapper(scenes.dataset, jobs), strict=True):
            images[start : start + len(pictures)] = pictures
            images.flush()
            # Last, and in one piece: these lines say that the pictures are there.
            file.write("".join(f"{text}\n" for text in texts))
            file.flush()
            lines += texts
            if log is not None:
                log(f"rendered {len(lines)} of {data.scenes} scenes")
            if stop():
                raise Interrupted
    return _open_array(folder / "images.npy", images.shape, np.uint8, mode="r"), lines


@contextlib.contextmanager
def _mapper(workers: int) -> Iterator[Callable]:
    """A ``map`` over argument tuples, lazy and in order, in this process or in others."""
    if workers == 1:
        yield lambda f, jobs: (f(*job) for job in jobs)
        return
    # Ctrl-C goes to every process of the terminal, and is for the one that finishes what is begun.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, signal.signal, ignore)
    try:
        yield lambda f, jobs: pool.map(f, *zip(*jobs, strict=True))
    finally:
        pool.shutdown(cancel_futures=True)


def load_posteriors(
    folder: str | Path,
    sd: SD,
    vae: Params,
    images: np.ndarray,
    *,
    batch_size: int = 64,
    stop: Callable[[], bool] = never,
    log: Callable[[str], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(mean, std) of the images' latents, float32 [n, h, w, C] each, encoded into ``folder`` where missing.

    They belong to these very parameters, scale and (as far as some of them tell) images: others are kept elsewhere.
    Interrupted as ``load_scenes``.
    """
    config = sd.config.vae
    shape = (len(images), images.shape[1] // config.factor, images.shape[2] // config.factor, config.latent_channels)
    fingerprint = _fingerprint(vae, repr((config, sd.dtype, images.shape)), images[::_SAMPLED])
    folder = Path(folder) / f"posteriors-{fingerprint}"
    folder.mkdir(parents=True, exist_ok=True)
    count = folder / "done.json"
    done = json.loads(count.read_text()) if count.exists() else 0
    mean, std = (
        _open_array(
            folder / f"{name}.npy", shape, np.float32, fresh=done == 0, mode="r+" if done < len(images) else "r"
        )
        for name in ("mean", "std")
    )
    encode = jax.jit(lambda params, image: encode_images(sd, params, image))
    vae = jax.device_put(vae)
    while done < len(images):
        last = min(done + CHUNK, len(images))
        for start in range(done, last, batch_size):
            part = images[start : min(start + batch_size, last)]
            padded = np.concatenate([part, np.zeros((batch_size - len(part), *part.shape[1:]), part.dtype)])
            for array, values in zip((mean, std), encode(vae, padded), strict=True):
                array[start : start + len(part)] = values[: len(part)]
        mean.flush()
        std.flush()
        done = last
        replace_text(count, json.dumps(done))
        if log is not None:
            log(f"encoded {done} of {len(images)} pictures")
        if stop():
            raise Interrupted
    return mean, std


def encode_images(sd: SD, vae: Params, image: Any) -> tuple[Any, Any]:
    """uint8 [B,H,W,3] -> mean and std of the scaled latents."""
    posterior = sd.vae.apply({"params": vae}, from_uint8(image), method="encode")
    return posterior.mean, posterior.std


def tokenize(tokenizer: Tokenizer, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(int32 [n, 77] of the captions, int32 [77] of the empty one). Raises RequestError for one that is too long."""
    return (
        tokenizer.encode(captions, long_prompt="error").tokens[:, 0],
        tokenizer.encode("").tokens[0, 0],
    )


@functools.cache
def scene_tokenizer() -> Tokenizer:
    """The tokenizer of models that are made from scenes: each of their words is one token."""
    return Tokenizer.from_words(scenes.all_captions())


def _open_array(path: Path, shape: tuple[int, ...], dtype: Any, *, fresh: bool = False, mode: str = "r+") -> np.ndarray:
    if fresh:
        return np.lib.format.open_memmap(path, "w+", dtype, shape)
    array = np.load(path, mmap_mode=mode)
    if array.shape != shape or array.dtype != dtype:
        raise RequestError(
            f"{path} is {array.dtype} {array.shape} where {np.dtype(dtype)} {shape} is expected; remove it"
        )
    return array


def _fingerprint(params: Params, *more: Any) -> str:
    digest = hashlib.sha256()
    for part in (*jax.tree.leaves(params), *more):
        digest.update(part.encode() if isinstance(part, str) else np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:12]


def replace_text(path: Path, text: str) -> None:
    """The file appears whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
