"""Every optimizer, in layouts and offloaded: the numbers of one process; its state moves between layouts."""

from pathlib import Path
from typing import Any

import pytest

from tests.layouts import ONE_PROCESS, Layout, build_engine, run_config, train, train_steps, worst_state_error
from tests.parallel.test_layouts import LOSS, NORM
from tests.pool import Pool

# Lion's step is a sign: where the momentum is zero but for rounding, so is the direction, by 2 lr of weights of 0.1.
WEIGHT = {"adamw": 5e-3, "muon": 1e-4, "lion": 2.5e-2, "adafactor": 1e-4}
OPTIMIZER = {"grad_clip": 0.5}
RATE = {"adamw": 1e-2, "muon": 1e-2, "lion": 1e-3, "adafactor": 1e-2}
slow = pytest.mark.slow


def check(pool: Pool, name: str, layout: Layout, **sections: Any) -> None:
    optimizer = {**OPTIMIZER, "name": name, "lr": RATE[name]}
    reference = pool.run(train, 1, "llama", ONE_PROCESS, 4, optimizer=optimizer)[0]
    ranks = pool.run(train, layout.world_size, "llama", layout, 4, optimizer=optimizer, **sections)
    for trained in ranks:
        assert trained.losses == pytest.approx(reference.losses, rel=LOSS)
        assert trained.grad_norms == pytest.approx(reference.grad_norms, rel=NORM)
    error, where = worst_state_error(ranks, reference)
    assert error < WEIGHT[name], f"{where} differs by {error:.1e}"


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("muon", Layout(tp=2, dp=2, sequence_parallel=True, zero_stage=1)),
        ("muon", Layout(pp=2, dp=2, zero_stage=1, schedule="zbv")),
        pytest.param("muon", Layout(tp=2, pp=2), marks=slow),
        pytest.param("muon", Layout(dp=4, zero_stage=2), marks=slow),
        ("adafactor", Layout(tp=2, dp=2, sequence_parallel=True, zero_stage=1)),
        pytest.param("adafactor", Layout(tp=2, pp=2), marks=slow),
        pytest.param("adafactor", Layout(dp=4, zero_stage=2), marks=slow),
        pytest.param("adafactor", Layout(pp=2, cp=2, zero_stage=1, schedule="zbv"), marks=slow),
        ("lion", Layout(tp=2, dp=2, zero_stage=2)),
        pytest.param("lion", Layout(dp=2, zero_stage=3), marks=slow),
        pytest.param("lion", Layout(pp=2, dp=2, zero_stage=1), marks=slow),
    ],
    ids=str,
)
def test_optimizer_equals_one_process(pool: Pool, name: str, layout: Layout) -> None:
    check(pool, name, layout)


@pytest.mark.parametrize(
    ("zero_stage", "offload"),
    [
        (1, {"optimizer": "cpu"}),
        pytest.param(2, {"optimizer": "cpu"}, marks=slow),
        (3, {"optimizer": "cpu", "parameters": "cpu"}),
    ],
    ids=str,
)
def test_offload_changes_no_number(pool: Pool, zero_stage: int, offload: dict[str, str]) -> None:
    check(pool, "adamw", Layout(dp=2, zero_stage=zero_stage), offload=offload)


def train_save(layout: Layout, optimizer: dict[str, Any], folder: Path) -> None:
    from megatrain.checkpoint.save import save_checkpoint

    engine = build_engine(run_config("llama", layout, optimizer=optimizer))
    try:
        train_steps(engine, 1, 2)
        save_checkpoint(engine, folder, 2, "run", {})
    finally:
        engine.close()


def resume_train(layout: Layout, optimizer: dict[str, Any], folder: Path) -> list[float]:
    from megatrain.checkpoint.load import load_checkpoint

    engine = build_engine(run_config("llama", layout, optimizer=optimizer))
    try:
        load_checkpoint(engine, folder / "step-00000002", lambda *_: None)
        return train_steps(engine, 3, 5).losses
    finally:
        engine.close()


@pytest.mark.parametrize("name", ["muon", "lion", "adafactor"])
def test_state_moves_to_another_layout(pool: Pool, tmp_path: Path, name: str) -> None:
    optimizer = {**OPTIMIZER, "name": name, "lr": RATE[name]}
    reference = pool.run(train, 1, "llama", ONE_PROCESS, 5, optimizer=optimizer)[0]
    before = Layout(tp=2, dp=2, zero_stage=1)
    pool.run(train_save, 4, before, optimizer, tmp_path)
    resumed = pool.run(resume_train, 2, Layout(pp=2), optimizer, tmp_path)[0]
    assert resumed == pytest.approx(reference.losses[2:], rel=LOSS)
