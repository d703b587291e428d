"""Stop signals while a save is under way: one lets it end, two of a kind give it up; nothing is lost either way."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatrain.checkpoint.store.arrays import CheckpointReader
from megatrain.checkpoint.store.folder import list_checkpoints
from tests.launch.test_pretrain import arguments, run, start

__all__ = ["arguments"]  # a fixture

# the program, whose saves of step 4 get nowhere while there is the file that its first argument names
PROGRAM = """
import pathlib, sys, time
from megatrain.checkpoint.store.files import Files
from launch.pretrain import main

gate, write = pathlib.Path(sys.argv[1]), Files._write

def behind_the_gate(self, path, *rest):
    while "step-00000004" in str(path) and gate.exists():
        time.sleep(0.01)
    return write(self, path, *rest)

Files._write = behind_the_gate
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def options(arguments: list[str]) -> list[str]:
    """Of a run that saves every second step."""
    return [*arguments, "--checkpoint.save_every", "2", "--schedule.name", "constant"]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "step"}


@pytest.mark.slow
def test_signals_during_a_save(tmp_path: Path, options: list[str]) -> None:
    gate, checkpoints = tmp_path / "gate", tmp_path / "runs" / "run" / "checkpoints"
    stump = checkpoints / ".step-00000004.partial"
    gate.touch()
    command = [sys.executable, "-c", PROGRAM, str(gate), *options, "--train.steps", "8"]
    process = start(*command)
    try:
        wait_for(stump.exists, process)
        for _ in range(2):
            process.send_signal(signal.SIGTERM)
            time.sleep(4)  # the second is another request only after two seconds
        output, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, "two signals end it, though the save gets nowhere"
    assert [path.name for path in list_checkpoints(checkpoints)] == ["step-00000002"], output + errors
    assert not (checkpoints / "owner.json").exists()

    left = stump.stat().st_ctime_ns
    process = start(*command)
    try:
        wait_for(lambda: stump.exists() and stump.stat().st_ctime_ns > left, process)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        gate.unlink()
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75, output + errors
    assert "at step 2" in output and "as SIGTERM asks" in output
    newest = list_checkpoints(checkpoints)[-1]
    CheckpointReader(newest).require_files()
    assert max(losses(checkpoints.parent)) == CheckpointReader(newest).step >= 4, "the save ended, and no step is lost"
    assert not list(checkpoints.glob(".step-*")), "the first one's stump is cleaned up"

    done = run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    whole = run(*command, "--name", "whole")
    assert whole.returncode == 0
    assert losses(checkpoints.parent) == losses(tmp_path / "runs" / "whole"), "bit for bit"
