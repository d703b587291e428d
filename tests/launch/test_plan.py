"""launch/plan.py: what it prints, and what it refuses."""

import subprocess
import sys
from pathlib import Path

import pytest

from launch.plan import main

ROOT = Path(__file__).parents[2]
PIPELINE = ["--parallel.pp", "2", "--train.global_batch_size", "4"]


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launch/plan.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_schedule_as_text_and_picture(tmp_path: Path) -> None:
    done = plan("--schedule", *PIPELINE, "--png", str(tmp_path / "a.png"))
    assert done.returncode == 0, done.stderr
    assert "idle 20.00 % (theory 20.00 %)" in done.stdout
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_every_axis_counts_among_the_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    """Without --world-size the config runs on as many ranks as it asks for, those of context among them."""
    assert main(["--schedule", *PIPELINE, "--parallel.cp", "2"]) == 0
    assert "idle 20.00 % (theory 20.00 %)" in capsys.readouterr().out


def test_refusals_say_what_to_do() -> None:
    alone = plan("--schedule")
    assert alone.returncode == 2 and "set parallel.pp to 2 or more" in alone.stderr
    wrong = plan("--schedule", *PIPELINE, "--parallel.pp_schedule", "zbv")
    assert wrong.returncode == 2 and "set parallel.stages_per_rank to 2" in wrong.stderr
    assert "Traceback" not in alone.stderr + wrong.stderr


def test_compatibility_is_told_with_the_exit_status() -> None:
    allowed = plan("--compat", "zero_stage=1,pp=2")
    assert (allowed.returncode, allowed.stdout) == (0, "allowed: zero_stage = 1, pp > 1\n")
    refused = plan("--compat", "zero_stage=2,pp=2,ep=2,num_experts=0")
    assert refused.returncode == 1 and refused.stdout.startswith("refused: zero_stage = 2, pp > 1")
    assert (
        "ZeRO-2 and ZeRO-3 partition gradients" in refused.stdout and "a dense model has no experts" in refused.stdout
    )
    assert "cure: set parallel.zero_stage to 0 or 1, or parallel.pp to 1" in refused.stdout
    unknown = plan("--compat", "zero=2,pp=2")
    assert unknown.returncode == 2 and "did you mean zero_stage?" in unknown.stderr
    both = plan("--compat", "pp=2", "--parallel.pp", "2")
    assert both.returncode == 2 and "write features after --compat" in both.stderr
    assert "Traceback" not in unknown.stderr + both.stderr


def test_what_is_not_asked_is_told_what_can_be(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--config", "configs/run/quickstart.yaml"], "give one of --schedule, which draws"),
        (["--schedule", *PIPELINE, "--overwrite"], "--overwrite with --png FILE"),
        (["--compat", "tp=2", "--png", "a.png"], "--png FILE goes with --schedule"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2 and said in capsys.readouterr().err
