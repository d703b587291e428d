"""The real launcher: training, TensorBoard files, resuming in another layout, and mistakes."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.factory import make_dataset
from tests.programs import run_program, unlaunched, warm_programs

ROOT = Path(__file__).resolve().parents[2]
TINY = """
model: {num_layers: 2, hidden_size: 32, attention: {num_heads: 4}, vocab_size: 300, max_seq_len: 32}
precision: {dtype: fp32}
train: {steps: 4, global_batch_size: 8, micro_batch_size: 2, log_every: 1, eval_batches: 1}
"""


def start(*command: str) -> subprocess.Popen[str]:
    """The command in the project's folder and a session of its own, as no launcher started it."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=unlaunched(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(*command: str) -> subprocess.CompletedProcess[str]:
    process = start(*command)
    output, errors = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def launcher(num_ranks: int, folder: Path = Path(sys.executable).parent) -> list[str]:
    program = str(folder / "deepspeed")
    return [program, "--num_gpus", str(num_ranks), "--master_port", str(20000 + os.getpid() % 20000)]


def deepspeed(num_ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The launcher and its ranks, each without its imports; a run that gets a signal has the real ones."""
    return run(*launcher(num_ranks, warm_programs()), "launch/pretrain.py", *arguments)


def alone(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The program on one process, without a launcher."""
    return run_program(["launch/pretrain.py", *arguments], ROOT, environment)


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


def rank_process(launched: subprocess.Popen[str], rank: int) -> int:
    """Process id of a rank: the descendant of the launcher that got its number."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_text().split("\0")
            if f"--local_rank={rank}" in words and os.getsid(int(process.name)) == launched.pid:
                return int(process.name)
    raise AssertionError(f"rank {rank} is not there")


@pytest.mark.parametrize("stop", ["SIGINT to one process", "SIGTERM to one of two ranks"])
def test_a_signal_saves_and_ends_the_run(tmp_path: Path, arguments: list[str], stop: str) -> None:
    one_process = "one process" in stop
    command = [sys.executable] if one_process else launcher(2)
    process = start(
        *command, "launch/pretrain.py", *arguments, "--train.steps", "100000", "--schedule.name", "constant"
    )
    assert process.stdout is not None
    try:
        next(line for line in process.stdout if line.startswith("step      3/"))
        asked = (process.pid, signal.SIGINT) if one_process else (rank_process(process, 1), signal.SIGTERM)
        os.kill(*asked)
        output, errors = process.communicate(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 75, output + errors
    assert "Traceback" not in errors
    saved = sorted((tmp_path / "runs" / "run" / "checkpoints").glob("step-*"))
    assert len(saved) == 1
    assert (saved[0] / "manifest.json").is_file()
    step = int(saved[0].name.removeprefix("step-"))
    rows = [json.loads(line) for line in (tmp_path / "runs" / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(1, step + 1)), "no step was lost"


def truncate_a_shard(data: Path) -> None:
    shard = sorted(data.glob("*.bin"))[0]
    shard.write_bytes(shard.read_bytes()[:-2])


def remove_a_shard(data: Path) -> None:
    sorted(data.glob("*.bin"))[0].unlink()


@pytest.mark.parametrize(
    ("damage", "expected"), [(truncate_a_shard, "bytes, expected"), (remove_a_shard, "missing file")]
)
def test_damaged_data_gets_one_message_from_one_rank(
    tmp_path: Path, arguments: list[str], damage: Callable[[Path], None], expected: str
) -> None:
    damage(tmp_path / "data")
    result = deepspeed(2, *arguments)
    assert result.returncode != 0
    assert result.stderr.count("error: ") == 1
    assert expected in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists(), "nothing was begun"


def test_a_rank_alone_with_a_mistake_says_where(arguments: list[str]) -> None:
    lonely = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    result = alone(*arguments, "--data.train", "nowhere", **lonely)
    assert result.returncode == 2
    assert f"error: rank 1 on {socket.gethostname()}: no data set at nowhere" in result.stderr


def test_another_models_checkpoint_gets_one_message(tmp_path: Path, arguments: list[str]) -> None:
    one_step = [*arguments, "--train.steps", "1"]
    assert alone(*one_step).returncode == 0
    result = alone(*one_step, "--model.attention.num_heads", "2", "--model.rope.theta", "5e5")
    assert result.returncode == 2
    assert result.stderr.count("error: ") == 1
    for field in ("model.attention.num_heads: 4 saved, 2 asked", "model.rope.theta"):
        assert field in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (["--parallel.tp", "2", "--parallel.pp", "2"], "parallel"),
        (["--model.num_head", "4"], "model.attention.num_heads"),
        (["--model.vocab_size", "200"], "vocab"),
        (["--data.train", "nowhere"], "nowhere"),
    ],
    ids=["more ranks than started", "unknown key", "vocabulary too small", "no data"],
)
def test_mistakes_get_one_message(arguments: list[str], extra: list[str], expected: str) -> None:
    result = alone(*arguments, *extra)
    assert result.returncode == 2
    assert result.stderr.count("error: ") == 1
    assert expected in result.stderr
    assert "Traceback" not in result.stderr
