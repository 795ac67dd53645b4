"""A progress bar, for those who wait."""

from __future__ import annotations

import sys


class Bar:
    """Told (what is done, of all), writes to stderr: a bar drawn over itself on a terminal, elsewhere a line for each
    tenth. ``unit`` is what one of them is called.
    """

    def __init__(self, unit: str = "step"):
        self.unit = unit

    def __call__(self, done: int, total: int) -> None:
        if sys.stderr.isatty():
            full = 30 * done // total
            end = "\n" if done == total else ""
            print(f"\r[{'#' * full}{'.' * (30 - full)}] {done}/{total}", end=end, file=sys.stderr, flush=True)
        elif 10 * done // total > 10 * (done - 1) // total:
            print(f"{self.unit} {done} of {total}", file=sys.stderr, flush=True)
