"""A run that is killed with SIGKILL at a random step goes on, when started again, as if nothing had happened."""

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from megatrain.checkpoint.store.folder import list_checkpoints
from tests.data.factory import make_dataset
from tests.launch.test_pretrain import deepspeed, launcher, start

STEPS = 70
CONFIG = """
model: {num_layers: 4, hidden_size: 32, vocab_size: 300, max_seq_len: 32, dropout: 0.1,
        attention: {num_heads: 4, dropout: 0.1}}
precision: {dtype: fp32}
train: {steps: 70, global_batch_size: 8, micro_batch_size: 2, log_every: 1}
checkpoint: {save_every: 4, keep_last: 2}
"""
LAYOUTS = {
    "one process": (1, ["--parallel.zero_stage", "0"]),
    "zero1": (2, ["--parallel.zero_stage", "1"]),
    "zero2": (2, ["--parallel.zero_stage", "2"]),
    "zero3": (2, ["--parallel.zero_stage", "3"]),
    "tensor": (2, ["--parallel.tp", "2", "--parallel.sequence_parallel", "true"]),
    "context": (2, ["--parallel.cp", "2"]),
    "pipeline": (2, ["--parallel.pp", "2"]),
    "interleaved": (
        2,
        ["--parallel.pp", "2", "--parallel.stages_per_rank", "2", "--parallel.pp_schedule", "interleaved_1f1b"],
    ),
    "tensor and pipeline": (4, ["--parallel.tp", "2", "--parallel.pp", "2"]),
    "pipeline and data": (4, ["--parallel.pp", "2", "--parallel.zero_stage", "1"]),
}


def losses(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "step"}


def kill_at_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """SIGKILL for the launcher and every rank, once ``step`` is logged and the first save, in the background, done."""
    end = time.monotonic() + 400
    metrics, checkpoints = run / "metrics.jsonl", run / "checkpoints"
    while not list_checkpoints(checkpoints) or f'"step": {step},' not in metrics.read_text():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it does not get there"
        time.sleep(0.02)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.send_signal(signal.SIGKILL)
    process.communicate()
    psutil.wait_procs(family)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_goes_on_bit_for_bit(tmp_path: Path, layout: str) -> None:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    data = make_dataset(tmp_path / "data", vocab_size=300)
    num_ranks, overrides = LAYOUTS[layout]
    common = ["--config", str(tmp_path / "tiny.yaml"), "--folder", str(tmp_path / "runs"), "--data.seq_len", "32"]
    common += ["--data.train", str(data), *overrides]
    whole = deepspeed(num_ranks, *common, "--name", "whole")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    step = random.Random(layout).randint(6, 12)
    killed = tmp_path / "runs" / "killed"
    process = start(*launcher(num_ranks), "launch/pretrain.py", *common, "--name", "killed")
    kill_at_step(process, killed, step)
    reached = max(losses(killed))  # the others may have gone on while it was looked for
    again = deepspeed(num_ranks, *common, "--name", "killed")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "took" in again.stdout, "the dead run's lock is taken over"
    resumed = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines() if '"resume"' in line]
    assert len(resumed) == 1
    assert 4 <= resumed[0]["step"] <= reached
    assert STEPS - resumed[0]["step"] >= 50
    assert losses(killed) == losses(tmp_path / "runs" / "whole"), "every loss, bit for bit"
