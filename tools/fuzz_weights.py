"""Damaged and hostile files of weights, at random, for as long as there is time: what tests/fuzz.py asks of each.

    python -m tools.fuzz_weights --minutes 10                          (at the root of the repository)
    python -m tools.fuzz_weights --minutes 60 --format ckpt flax --seed 7 --out failures

Each is a real file of one of the formats after a few mutations (tests/mutants.py), opened as a whole model, as one
network, or by ``sd-jax info``. Printed are, for each format, how many there were and how many a second, how many of
them opened and how many were refused, and the most memory that one took, as a share of what is allowed. The first that
does what no file may do ends the run with exit status 1, made as small as hypothesis can: its files, what was done to
them, and the traceback are then in --out. Another --seed makes others. Needs the ``test`` extra, and Unix.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, Phase, Verbosity

from tests import fuzz, mutants

ROUND = 100  # mutants of one format before the next has its turn


class Failure(Exception):
    """A mutant that does what none may do."""

    def __init__(self, mutant: fuzz.Mutant, error: BaseException):
        super().__init__(f"{mutant.kind}: {', '.join(mutant.steps)}: {error}")
        self.mutant, self.error = mutant, error


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--format", nargs="+", choices=fuzz.KINDS, default=fuzz.KINDS, help="all of them, if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("fuzz-failures"), help="a folder for what fails")
    args = parser.parse_args(argv)
    outcomes: dict[str, list[fuzz.Outcome]] = collections.defaultdict(list)
    seconds: dict[str, float] = collections.defaultdict(float)
    failure = None
    for kind in args.format:  # what is imported and traced once should not count
        for way in ("whole", "info", "vae"):
            fuzz.examine(fuzz.Mutant(kind, fuzz.original(kind).files, (), way))
    end = time.monotonic() + 60 * args.minutes
    for turn, kind in zip(itertools.count(), itertools.cycle(args.format)):
        start = time.monotonic()
        if start > end:
            break
        try:
            run(kind, args.seed + turn, end, outcomes[kind])
        except Failure as error:
            failure = error
            break
        seconds[kind] += time.monotonic() - start
    report(outcomes, seconds)
    if failure is None:
        return 0
    folder = save(failure, args.out)
    print(f"\nFAILED, see {folder}\n{failure}", file=sys.stderr)
    return 1


def run(kind: str, seed: int, end: float, outcomes: list[fuzz.Outcome]) -> None:
    """One round. Raises Failure."""
    failed: list[Failure] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=ROUND,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        verbosity=Verbosity.quiet,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @hypothesis.given(mutants.mutants(kind))
    def examine(mutant: fuzz.Mutant) -> None:
        if time.monotonic() > end and not failed:
            return
        try:
            outcomes.append(fuzz.examine(mutant))
        except Exception as error:
            failed.append(Failure(mutant, error))
            raise

    try:
        examine()
    except Exception:
        if not failed:
            raise
        raise failed[-1] from failed[-1].error  # the smallest: hypothesis runs it once more at its end


def report(outcomes: dict[str, list[fuzz.Outcome]], seconds: dict[str, float]) -> None:
    print(f"{'format':12}{'mutants':>9}{'a second':>10}{'opened':>9}{'refused':>9}{'peak MiB':>10}{'allowed':>9}")
    for kind, found in outcomes.items():
        if found and seconds[kind]:
            opened, worst = sum(o.opened for o in found), max(found, key=lambda o: o.peak / o.bound)
            rate, peak, allowed = len(found) / seconds[kind], worst.peak / 2**20, worst.peak / worst.bound
            print(f"{kind:12}{len(found):9}{rate:10.1f}{opened:9}{len(found) - opened:9}{peak:10.1f}{allowed:9.0%}")


def save(failure: Failure, out: Path) -> Path:
    """The files of a mutant, and what there is to say of it -> their folder."""
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{failure.mutant.kind}-", dir=out))
    for name, content in failure.mutant.files.items():
        path = folder / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    how = f"opened as {failure.mutant.way!r}, verify={failure.mutant.verify}"
    lines = [*failure.mutant.steps, how, "", *traceback.format_exception(failure.error)]
    (folder / "failure.txt").write_text("\n".join(lines), encoding="utf-8", errors="backslashreplace")
    return folder


if __name__ == "__main__":
    sys.exit(main())
