"""A progress bar, for those who wait."""

from __future__ import annotations

import sys
import time


class Bar:
    """Told (what is done, of all), writes to stderr: a bar drawn over itself on a terminal, elsewhere a line for each
    tenth. ``unit`` is what one of them is called; nothing is said in the first ``after`` seconds.
    """

    def __init__(self, unit: str = "step", after: float = 0.0):
        self.unit, self.begin = unit, time.monotonic() + after

    def __call__(self, done: int, total: int) -> None:
        if time.monotonic() < self.begin:
            return
        if sys.stderr.isatty():
            full = 30 * done // total
            end = "\n" if done == total else ""
            print(f"\r[{'#' * full}{'.' * (30 - full)}] {done}/{total}", end=end, file=sys.stderr, flush=True)
        elif 10 * done // total > 10 * (done - 1) // total:
            print(f"{self.unit} {done} of {total}", file=sys.stderr, flush=True)
