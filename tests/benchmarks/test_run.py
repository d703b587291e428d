"""Every benchmark runs, at a small size; what it measures is nobody's test."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED = {"__init__", "paired", "peer_models", "traffic", "wire_peers"}
SMALL = {
    "checkpoint": ["--repeats", "1", "--hidden-size", "64"],
    "conversion": ["--layers", "2", "--width", "64", "--vocabulary", "128", "--proof-tokens", "32"],
    "bubble": ["--pp", "2", "--factors", "2"],
    "deterministic": ["--repeats", "1"],
    "data_write": ["--repeats", "1", "--megabytes", "1"],
    "data_read": ["--tokens", "3000000", "--documents", "1000000", "--repeats", "1", "--steps", "200"],
    "start": ["--repeats", "1"],
    "memory": [],
    "mixture": ["--repeats", "1", "--micro-batches", "1", "--small", "--eager"],
    "recompute": ["--repeats", "1", "--modes", "none", "full", "budget 0.5", "--small"],
    "peers": ["--pairs", "1", "--cases", "almost empty", "tensor 2", "ZeRO 1 over two ranks"],
    "wire": ["--axes", "ZeRO 1", "tensor + sequence", "--peers", "--worlds", "16", "10240"],
    "throughput": ["--batch", "1", "--steps", "1", "--dtypes", "bf16", "fp32", "--eager"],
}


def test_every_benchmark_is_here() -> None:
    assert {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - SHARED == SMALL.keys()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SMALL)
def test_it_runs(name: str) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}", *SMALL[name]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
