"""Two launchers on one run folder: the second job stops at its start and says who is there."""

import contextlib
import os
import signal
import socket
from pathlib import Path

import pytest

from tests.launch.test_pretrain import arguments, launcher, rank_process, run, start

__all__ = ["arguments"]  # a fixture


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_second_job_is_refused(tmp_path: Path, arguments: list[str]) -> None:
    endless = ["launch/pretrain.py", *arguments, "--train.steps", "100000", "--schedule.name", "constant"]
    first = start("env", "SLURM_JOB_ID=4711", *launcher(2), *endless)
    assert first.stdout is not None
    try:
        next(line for line in first.stdout if line.startswith("step      3/"))
        owner = rank_process(first, 0)
        other = launcher(2)
        other[-1] = str(int(other[-1]) + 20000)  # a port of its own
        second = run("env", "SLURM_JOB_ID=4712", *other, *endless)
        assert second.returncode == 2
        assert second.stderr.count("error: ") == 1
        checkpoints = tmp_path / "runs" / "run" / "checkpoints"
        assert f"{checkpoints} belongs to process {owner} on {socket.gethostname()}, job 4711" in second.stderr
        assert "Traceback" not in second.stderr
        assert first.poll() is None, "the first one is not disturbed"
        os.kill(owner, signal.SIGTERM)
        output, errors = first.communicate(timeout=300)
        assert first.returncode == 75, output + errors
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)
    third = run("env", "SLURM_JOB_ID=4712", *launcher(2), *endless[:-3], "1", *endless[-2:])
    assert third.returncode == 0, "a folder that was given back is free: " + third.stdout + third.stderr
