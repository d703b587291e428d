"""The list of mutants stays true to the package, and one of every part of it is seen."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.mutants.mutant import ROOT, Mutant
from tests.mutants.page import PAGE
from tests.mutants.rooms import ALL, ROOMS, SAMPLE
from tests.mutants.witnesses import WITNESSES

LEAST_SEEN = 0.95


def test_every_mutant_stands_in_the_package_once_and_is_python() -> None:
    problems = [f"{mutant.file}: {problem}" for mutant in ALL if (problem := _problem(mutant))]
    assert not problems, "\n".join(problems)
    [(_, most)] = Counter((mutant.file, mutant.old, mutant.new) for mutant in ALL).most_common(1)
    assert most == 1, "no mutant twice"
    assert len(ALL) >= 150 and len({mutant.public for mutant in ROOMS["public"]}) >= 12


def _problem(mutant: Mutant) -> str:
    try:
        mutant.source()
    except ValueError as error:
        return str(error)
    return ""


def test_witnesses_are_tests() -> None:
    assert {name for mutant in ALL for name in mutant.see} <= set(WITNESSES)
    for tests in WITNESSES.values():
        for test in tests:
            file, _, function = test.partition("[")[0].partition("::")
            if test != "--deselect":
                assert (ROOT / file).exists(), test
                assert not function or f"def {function}(" in (ROOT / file).read_text(encoding="utf-8"), test


@pytest.mark.timeout(600)
def test_one_mutant_of_every_part_is_seen(tmp_path: Path) -> None:
    verdicts = _run(tmp_path, "--sample", "--control", "schedule", "tp")
    assert len(verdicts) == len(SAMPLE) == len(ROOMS)
    assert all(verdict["seen"] for verdict in verdicts), verdicts


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_mutants_are_seen(tmp_path: Path) -> None:
    """Every one but a few, each with its reason."""
    before = PAGE.read_text(encoding="utf-8")
    try:
        verdicts = _run(tmp_path, "--control", *WITNESSES)
    finally:
        PAGE.write_text(before, encoding="utf-8")
    seen = [verdict["seen"] for verdict in verdicts]
    assert len(seen) == len(ALL) and sum(seen) >= LEAST_SEEN * len(ALL)
    holes = [mutant.name for mutant, is_seen in zip(ALL, seen, strict=True) if not is_seen and not mutant.survives]
    assert not holes, "\n".join(holes)


def _run(folder: Path, *options: str) -> list[dict[str, object]]:
    """Verdicts of the runner, in the order of the list, once what it ran without a mistake is green."""
    results = folder / "results.json"
    command = [sys.executable, "-m", "tests.mutants.run", "--results", str(results), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return list(json.loads(results.read_text(encoding="utf-8")).values())
