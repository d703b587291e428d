"""On a GPU two deterministic runs have the same bits, with every kernel that only GPUs have."""

import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


def test_two_runs_have_the_same_bits() -> None:
    command = [sys.executable, "-m", "tests.engine.determinism_run"]
    first, second = (subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout for _ in range(2))
    assert first.count("\n") == 7 and first.splitlines() == second.splitlines()
