"""`train.deterministic`: which run it is, where its ranks are and whether it restarted changes no bit."""

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from megatrain.engine import determinism
from tests.engine.determinism_run import MIXTURE, digest
from tests.layouts import Layout, build_engine, global_batch, run_config
from tests.pool import Pool

CLASSES = [
    Layout(),
    Layout(dp=2, zero_stage=3),
    Layout(tp=2, sequence_parallel=True, zero_stage=1),
    Layout(pp=2, zero_stage=1),
]
MORE_CLASSES = [
    Layout(tp=2),
    Layout(dp=2),
    Layout(dp=2, zero_stage=1),
    Layout(dp=2, zero_stage=2),
    Layout(cp=2, zero_stage=1),
    Layout(cp=2, cp_method="ulysses", zero_stage=3),
    Layout(dp=2, ep=2, zero_stage=2),
    Layout(dp=4, ep=2, zero_stage=1),
    Layout(pp=2, dp=2, zero_stage=1, schedule="zbv"),
    Layout(tp=2, pp=2, dp=2, zero_stage=1, sequence_parallel=True),
]


@dataclass
class Bits:
    """Of the third step, in each run: loss, gradient norm and a digest of the state after it."""

    runs: list[list[Any]]
    checkpoint: str


def steps_of(engine: Any, *steps: int) -> list[Any]:
    share = engine.mesh.coordinate("dp"), engine.mesh.topology.dp
    results = [engine.train_step(global_batch(step, *share), step) for step in steps]
    return [*((float(result.loss), float(result.grad_norm)) for result in results), digest(engine)]


def run_and_restart(layout: Layout, folder: str, start: str | None) -> Bits:
    """Three steps with a checkpoint before the last; then the last from the checkpoint ``start``."""
    from megatrain.checkpoint.load import load_checkpoint
    from megatrain.checkpoint.save import save_checkpoint

    determinism.make_deterministic()
    model = {"dropout": 0.1, "attention.dropout": 0.1} | (MIXTURE if layout.ep > 1 or layout == Layout() else {})
    engine = build_engine(run_config("llama", layout, model=model, train={"deterministic": True}))
    try:
        steps_of(engine, 1, 2)
        path = save_checkpoint(engine, Path(folder), 2, "run", {})
        runs = [steps_of(engine, 3)]
        if start is not None:
            load_checkpoint(engine, Path(start), lambda data, step: None)
            runs.append(steps_of(engine, 3))
        return Bits(runs, str(path))
    finally:
        engine.close()
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "layout", [*CLASSES, *(pytest.param(x, marks=pytest.mark.slow) for x in MORE_CLASSES)], ids=str
)
def test_another_run_another_placement_and_a_restart_have_the_same_bits(
    pool: Pool, memory_path: Path, layout: Layout
) -> None:
    folders = [str(memory_path / name) for name in ("first", "second")]
    first = pool.run(run_and_restart, layout.world_size, layout, folders[0], None)
    elsewhere = range(layout.world_size)[::-1] if layout.world_size > 1 else [1]
    second = pool.run(
        run_and_restart, layout.world_size, layout, folders[1], first[0].checkpoint, placement=list(elsewhere)
    )
    for one, other in zip(first, second, strict=True):
        assert other.runs == one.runs * 2


@pytest.mark.parametrize(
    ("deterministic", "local", "threads"), [(False, 1, 8), (False, 4, 2), (True, 1, 2), (True, 2, 2), (True, 4, 2)]
)
def test_threads_do_not_depend_on_the_host(
    monkeypatch: pytest.MonkeyPatch, deterministic: bool, local: int, threads: int
) -> None:
    """Four ranks on hosts of eight cores; sums are split over threads."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8))
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    assert determinism.num_cpu_threads(deterministic) == threads


def test_what_is_chosen_for_a_run_stays_if_it_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    try:
        determinism.make_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and os.environ["NCCL_ALGO"] == "Tree"
    finally:
        torch.use_deterministic_algorithms(False)


def digests(ranks_of_hosts: list[int], *arguments: str) -> list[str]:
    """What each rank of a run prints, whose hosts hold so many ranks each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = [local for size in ranks_of_hosts for local in [(number, size) for number in range(size)]]
    running = []
    for rank, (local_rank, local_size) in reversed(list(enumerate(places))):  # the last starts first
        names = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "MASTER_PORT", "PYTHONHASHSEED")
        values = (rank, local_rank, local_size, len(places), port, rank + len(ranks_of_hosts))
        environment = os.environ | {"MASTER_ADDR": "127.0.0.1"} | dict(zip(names, map(str, values), strict=True))
        environment |= {"OMP_WAIT_POLICY": "PASSIVE"}  # these threads are more than there are cores
        environment.pop("OMP_NUM_THREADS", None)  # it would be what decides
        command = [sys.executable, "-m", "tests.engine.determinism_run", *arguments]
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    try:
        found = [process.communicate()[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * len(places)
    return found[::-1]


@pytest.mark.slow
@pytest.mark.timeout(900)  # eight processes that import everything
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: one thread, wherever a rank is")
def test_two_ranks_on_one_host_or_on_two() -> None:
    """Started as a run is. Without the field they have other threads, and other bits."""
    assert digests([2]) == digests([1, 1])
    assert digests([2], "undetermined") != digests([1, 1], "undetermined")
