"""Runs mutants, and writes what came of them into docs/parity.md.

python -m tests.mutants.run                     # all that has no result yet, then the page
python -m tests.mutants.run --seconds 240       # for so long; the next call goes on
python -m tests.mutants.run --file optim/lion   # those of some files, again
"""

import argparse
import functools
import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.mutants import page
from tests.mutants.mutant import ROOT, Mutant
from tests.mutants.rooms import ALL, ROOMS, SAMPLE
from tests.mutants.warm import Verdict, import_libraries, judge
from tests.mutants.witnesses import WITNESSES, tests_of

TIMEOUT = 120.0  # seconds for a mutant's tests; what takes longer hangs


def main() -> int:
    options = _parser().parse_args()
    results = Results(options.results)
    import_libraries()
    for name in options.control:
        if (verdict := judge(None, WITNESSES[name], TIMEOUT)).seen:
            print(f"{name} is red without a mistake: {verdict.by}")
            return 2
    chosen = SAMPLE if options.sample else [mutant for room in options.rooms for mutant in ROOMS[room]]
    chosen = [mutant for mutant in chosen if options.file in mutant.file]
    new = [mutant for mutant in chosen if options.file or results.of(mutant) is None]
    for mutant, verdict in judged(new, options.jobs, options.seconds):
        results.add(mutant, verdict)
        said = "seen" if verdict.seen else "SURVIVED"
        print(f"{said} {verdict.seconds:5.1f} s {mutant.name}: {verdict.by}", flush=True)
    if left := sum(results.of(mutant) is None for mutant in chosen):
        print(f"{left} have no result yet: call again")
        return 1
    if chosen == ALL:
        page.write({mutant: verdict for mutant in ALL if (verdict := results.of(mutant)) is not None})
    return 0


def judged(mutants: list[Mutant], jobs: int, seconds: float) -> Iterator[tuple[Mutant, Verdict]]:
    """Verdicts in the order of ``mutants``; ``jobs`` at a time, none begun after so many ``seconds``."""
    end = time.monotonic() + seconds
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for mutant, verdict in pool.imap(functools.partial(_judged, end), mutants):
            if verdict is not None:
                yield mutant, verdict


def _judged(end: float, mutant: Mutant) -> tuple[Mutant, Verdict | None]:
    return mutant, judge(mutant, tests_of(mutant.see), TIMEOUT) if time.monotonic() < end else None


class Results:
    """Verdicts in a file, by mutant; each is kept as soon as it is there."""

    def __init__(self, path: Path):
        self._path = path
        self._known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def of(self, mutant: Mutant) -> Verdict | None:
        found = self._known.get(_key(mutant))
        return None if found is None else Verdict(**found)

    def add(self, mutant: Mutant, verdict: Verdict) -> None:
        self._known[_key(mutant)] = vars(verdict)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self._known, indent=1), encoding="utf-8")


def _key(mutant: Mutant) -> str:
    text = json.dumps([mutant.file, mutant.old, mutant.new])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants.run", description=__doc__)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no mutant after so long")
    parser.add_argument("--rooms", nargs="+", default=list(ROOMS), choices=ROOMS, help="only these")
    parser.add_argument("--sample", action="store_true", help="one of each part of the package; writes no page")
    parser.add_argument("--control", nargs="+", default=[], choices=WITNESSES, help="must be green without a mistake")
    cores = len(os.sched_getaffinity(0))  # ranks of a layout wait for each other half of the time
    parser.add_argument("--jobs", type=int, default=2 * cores, help="mutants at a time")
    parser.add_argument("--file", default="", help="only mutants of files whose path holds this, again")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "mutants.json", help="where verdicts are kept")
    return parser


if __name__ == "__main__":
    sys.exit(main())
