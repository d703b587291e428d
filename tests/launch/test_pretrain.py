"""The real launcher: training, TensorBoard files, resuming in another layout, and mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.factory import make_dataset

ROOT = Path(__file__).resolve().parents[2]
TINY = """
model: {num_layers: 2, hidden_size: 32, num_heads: 4, vocab_size: 300, max_seq_len: 32}
precision: {dtype: fp32}
train: {steps: 4, global_batch_size: 8, micro_batch_size: 2, log_every: 1, eval_batches: 1}
"""


def deepspeed(num_ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("deepspeed")
    environment = {name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "RANK")}
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    command = [str(program), "--num_gpus", str(num_ranks), "--master_port", str(20000 + os.getpid() % 20000)]
    return subprocess.run(
        [*command, "launch/pretrain.py", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY)
    data = make_dataset(tmp_path / "data", vocab_size=300)
    return [
        *("--config", str(config), "--folder", str(tmp_path / "runs"), "--data.seq_len", "32"),
        *("--data.train", str(data), "--data.validation", str(data)),
    ]


def test_train_then_resume_in_another_layout(tmp_path: Path, arguments: list[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = deepspeed(4, *arguments, "--parallel.tp", "2", "--parallel.pp", "2")
    assert first.returncode == 0, first.stdout + first.stderr
    second = deepspeed(2, *arguments, "--parallel.zero_stage", "2", "--train.steps", "6")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "at step 4" in second.stdout
    run = tmp_path / "runs" / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    board = EventAccumulator(str(run / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx([row["loss"] for row in steps])
    assert (run / "checkpoints" / "step-00000006" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--parallel.tp", "2", "--parallel.pp", "2"], "parallel"),
        (["--model.num_head", "4"], "model.num_heads"),
        (["--model.vocab_size", "200"], "vocab"),
        (["--data.train", "nowhere"], "nowhere"),
    ],
    ids=["more ranks than started", "unknown key", "vocabulary too small", "no data"],
)
def test_mistakes_get_one_message(arguments: list[str], extra: list[str], expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "launch/pretrain.py", *arguments, *extra]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("error: ") == 1
    assert expected in result.stderr
    assert "Traceback" not in result.stderr
