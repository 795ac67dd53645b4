"""Files mapped into memory, read a piece at a time by several threads, and no larger in memory than those pieces."""

from __future__ import annotations

import collections
import concurrent.futures
import mmap
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from sd_jax.types import WeightsError

MAX_WORKERS = 4  # threads; each may hold one tensor
Item = TypeVar("Item")
Result = TypeVar("Result")


class MappedFile:
    """The bytes of a regular file, read-only, as ``data``. Raises WeightsError where it cannot be read."""

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for its other end
                raise WeightsError(f"{self.path} is not a file; give a checkpoint file")
            if os.path.getsize(path) == 0:
                raise WeightsError(f"{self.path} is empty; download it again")
            with open(path, "rb") as f:
                self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as e:
            raise WeightsError(
                f"{self.path} cannot be read ({e.strerror}); check the path and its permissions"
            ) from None
        self.data = memoryview(self._map)

    def forget(self, start: int, stop: int) -> None:
        """Let bytes ``start`` to ``stop`` leave this process' memory; whoever looks again gets them from the disk."""
        start -= start % mmap.PAGESIZE
        if stop > start and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)


def ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """``map`` in threads: in order, with no more results waiting than there are threads."""
    workers = min(MAX_WORKERS, os.cpu_count() or 1)
    waiting: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) == workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
