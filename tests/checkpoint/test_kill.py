"""A save that is killed anywhere: the newest committed checkpoint loads, whole and of one save; stumps are cleaned."""

import builtins
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatrain.checkpoint.store.arrays import CheckpointReader
from megatrain.checkpoint.store.folder import clean_stumps, newest_checkpoint
from tests.checkpoint.test_mutations import ARRAYS, KINDS, load, save_model
from tests.checkpoint.test_store import sample

CALLS = [(os, name) for name in ("fsync", "mkdir", "rename", "replace", "rmdir", "unlink")] + [(builtins, "open")]
OLD = 1  # the step before


def kill_before_call(number: int) -> None:
    """Lets this process die right before its call ``number`` to any of ``CALLS``, on whatever thread."""
    counted = iter(range(1, 10**6))

    def counting(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(counted) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return call

    for module, name in CALLS:
        setattr(module, name, counting(getattr(module, name)))


def kill_at_calls(root: Path, step: int, first: int, stride: int) -> None:
    """From a copy of ``root/start`` each: saves ``step`` in a child that dies at call ``first``, and so on."""
    for number in range(first, 10**6, stride):
        folder = root / f"killed-{number:04d}"
        shutil.copytree(root / "start", folder)
        child = os.fork()
        if child == 0:
            kill_before_call(number)
            save_model(folder, step, "run", seed=step + 10)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            return


def kill_at_times(root: Path, count: int, seed: int) -> None:
    """Children that save step after step, each killed after a random time."""
    chosen = random.Random(seed)
    for number in range(count):
        folder = root / f"killed-{number:04d}"
        shutil.copytree(root / "start", folder)
        child = os.fork()
        if child == 0:
            for step in range(2, 1000):
                save_model(folder, step, "run", seed=step + 10)
        time.sleep(chosen.uniform(0.0, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def run_apart(call: str) -> None:
    """In a process without threads, which may fork."""
    program = f"from {__name__} import *; {call}"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=1500, cwd=Path(__file__).parents[2])


def require_whole(folder: Path) -> int:
    """The step of the newest checkpoint, once every number in it was compared with those of its save."""
    newest = newest_checkpoint(folder)
    assert newest is not None
    load(newest)
    reader = CheckpointReader(newest)
    seeds = set()
    for number, kind in enumerate(KINDS):
        for name, (shape, _) in ARRAYS.items():
            values = reader.read(kind, name).tobytes()
            fitting = [
                seed
                for seed in (reader.step, reader.step + 10)
                if values == sample(*shape, seed=10 * seed + number).tobytes()
            ]
            assert len(fitting) == 1, f"{kind} of {name} is of no save"
            seeds.add(fitting[0])
    assert len(seeds) == 1, "a mix of two saves"
    return seeds.pop()


def require_nothing_lost(root: Path) -> list[int]:
    found = []
    for folder in sorted(root.glob("killed-*")):
        seed = require_whole(folder)
        clean_stumps(folder)
        assert require_whole(folder) == seed, "cleaning lost the checkpoint"
        assert not list(folder.glob(".step*"))
        found.append(seed)
        shutil.rmtree(folder)
    return found


@pytest.mark.parametrize("step", [OLD + 1, OLD], ids=["next_step", "same_step"])
@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow, id="all"), pytest.param(4, id="some")])
@pytest.mark.timeout(1800)
def test_killed_at_calls(memory_path: Path, step: int, stride: int) -> None:
    save_model(memory_path / "start", OLD, "run", seed=OLD)
    run_apart(f"kill_at_calls(Path({str(memory_path)!r}), {step}, 1, {stride})")
    seeds = require_nothing_lost(memory_path)
    assert len(seeds) > 120 // stride
    assert seeds == sorted(seeds), "once the new checkpoint is there it stays"
    assert set(seeds) == {OLD, step + 10}


@pytest.mark.parametrize("count", [pytest.param(100, marks=pytest.mark.slow), 12])
@pytest.mark.timeout(1800)
def test_killed_at_random_times(memory_path: Path, count: int) -> None:
    save_model(memory_path / "start", OLD, "run", seed=OLD)
    run_apart(f"kill_at_times(Path({str(memory_path)!r}), {count}, 5)")
    assert len(require_nothing_lost(memory_path)) == count
