"""Every optimizer, in layouts and offloaded: the numbers of one process; its state moves between layouts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatrain.checkpoint.store.arrays import CheckpointReader
from megatrain.checkpoint.store.manifest import ArraySpec
from tests.layouts import (
    ONE_PROCESS,
    Layout,
    Trained,
    build_engine,
    run_config,
    train,
    train_steps,
    worst_state_error,
)
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
        ("adafactor", Layout(dp=2)),
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


def train_save_resume(layout: Layout, optimizer: dict[str, Any], folder: Path) -> tuple[Trained, Trained]:
    """The last steps of a run that saves on its way, and of one that goes on from there."""
    from megatrain.checkpoint.load import load_checkpoint
    from megatrain.checkpoint.save import save_checkpoint

    config, ran = run_config("llama", layout, optimizer=optimizer), []
    for resumes in (False, True):
        engine = build_engine(config)
        try:
            if resumes:
                load_checkpoint(engine, folder / "step-00000002", lambda *_: None)
            else:
                train_steps(engine, 1, 2)
                save_checkpoint(engine, folder, 2, "run", {})
            ran.append(train_steps(engine, 3, 5))
        finally:
            engine.close()
    return ran[0], ran[1]


def resume_train(layout: Layout, optimizer: dict[str, Any], folder: Path) -> list[float]:
    from megatrain.checkpoint.load import load_checkpoint

    engine = build_engine(run_config("llama", layout, optimizer=optimizer))
    try:
        load_checkpoint(engine, folder / "step-00000002", lambda *_: None)
        return train_steps(engine, 3, 5).losses
    finally:
        engine.close()


@pytest.mark.parametrize("name", ["muon", "lion", "adafactor"])
def test_a_resumed_run_has_the_same_bits_and_state_moves_to_another_layout(
    pool: Pool, tmp_path: Path, name: str
) -> None:
    optimizer = {**OPTIMIZER, "name": name, "lr": RATE[name]}
    reference = pool.run(train, 1, "llama", ONE_PROCESS, 5, optimizer=optimizer)[0]
    for went_on, resumed in pool.run(train_save_resume, 4, Layout(tp=2, dp=2, zero_stage=1), optimizer, tmp_path):
        assert resumed.losses == went_on.losses and resumed.grad_norms == went_on.grad_norms
        assert resumed.state.keys() == went_on.state.keys()
        for key, (values, _) in went_on.state.items():
            assert np.array_equal(resumed.state[key][0], values), key
    check_only_the_optimizers_state_is_stored(name, CheckpointReader(tmp_path / "step-00000002").arrays)
    moved = pool.run(resume_train, 2, Layout(pp=2), optimizer, tmp_path)[0]
    assert moved == pytest.approx(reference.losses[2:], rel=LOSS)


def check_only_the_optimizers_state_is_stored(name: str, arrays: dict[tuple[str, str], ArraySpec]) -> None:
    shapes = {weight: spec.shape for (kind, weight), spec in arrays.items() if kind == "weight"}
    for weight, shape in shapes.items():
        kept = {kind: spec.shape for (kind, other), spec in arrays.items() if other == weight and kind != "weight"}
        matrix = len(shape) == 2
        if name == "adafactor" and matrix:
            assert kept == {"exp_avg_sq_rows": shape[:1], "exp_avg_sq_columns": shape[1:]}
        elif name == "adafactor":
            assert kept == {"exp_avg_sq": shape}
        elif name == "lion" or (matrix and weight.startswith("layers.")):
            assert kept == {"exp_avg": shape}
        else:
            assert kept == {"exp_avg": shape, "exp_avg_sq": shape}
