"""Numbers that are not finite: what is skipped, named, saved and told."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatrain.checkpoint.store.folder import list_checkpoints
from megatrain.config.schema import RunConfig
from tests.data.factory import make_dataset
from tests.layouts import Layout, Trained, build_engine, global_batch, run_config, train_steps
from tests.pool import Pool

PLANTED = "layers.2.attention.query_key_value.weight"


def step_with_a_planted_nan(layout: Layout, precision: dict[str, Any], offload: str = "none") -> tuple[Any, ...]:
    """A good step, one with NaN in one gradient of rank 0 alone, and its state before and after; who is blamed."""
    from megatrain.engine.non_finite import bad_gradient, bad_state

    engine = build_engine(run_config("llama", layout, precision=precision, offload={"optimizer": offload}))
    try:
        before = train_steps(engine, 1, 1)
        planted = dict(engine.parameters).get(PLANTED)
        owner = engine.mesh.coordinate("dp") == engine.mesh.coordinate("tp") == 0
        if planted is not None and owner:
            planted.register_hook(lambda gradient: gradient.masked_fill(torch.ones_like(gradient).bool(), torch.nan))
        after = train_steps(engine, 2, 2)
        batch = global_batch(2, engine.mesh.coordinate("dp"), engine.mesh.topology.dp)
        return before, after, bad_gradient(engine, batch), bad_state(engine), torch.distributed.get_rank()
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        (Layout(), {"dtype": "fp32"}),
        (Layout(dp=2, zero_stage=0), {"dtype": "bf16"}),
        (Layout(dp=2, zero_stage=1), {"dtype": "bf16", "gradient_dtype": "compute"}),
        (Layout(dp=2, zero_stage=2), {"dtype": "bf16"}),
        (Layout(dp=2, zero_stage=3), {"dtype": "bf16"}),
        (Layout(tp=2, pp=2), {"dtype": "fp32"}),
        (Layout(pp=2, dp=2, zero_stage=1), {"dtype": "bf16"}),
    ],
    ids=lambda value: str(value) if isinstance(value, Layout) else "-".join(value.values()),
)
def test_a_nan_on_one_rank_skips_the_step_on_all(pool: Pool, layout: Layout, precision: dict[str, Any]) -> None:
    """Whoever updates: weights and moments keep every bit; the parameter and the rank where it arose are named."""
    ranks = pool.run(step_with_a_planted_nan, layout.world_size, layout, precision)
    for before, after, gradient, state, _ in ranks:
        assert (before.skipped, after.skipped) == ([False], [True])
        require_same_state(before, after)
        assert gradient.name == PLANTED
        assert state is None
    (rank,) = {found.rank for _, _, found, _, _ in ranks}
    assert rank == 0


def require_same_state(before: Trained, after: Trained) -> None:
    for key, (part, _) in before.state.items():
        assert np.array_equal(part, after.state[key][0]), key


def state_with_infinity(layout: Layout, kind: str) -> Any:
    """What is found in the state of two ranks, of which the last one has an infinity."""
    from megatrain.engine.non_finite import bad_state
    from megatrain.engine.state import local_fragments

    engine = build_engine(run_config("llama", layout))
    try:
        train_steps(engine, 1, 1)
        if torch.distributed.get_rank() == layout.world_size - 1:
            fragment = local_fragments(engine)[-1]
            values = fragment.values(kind).clone()
            values[-1] = torch.inf
            fragment.set(kind, values)
        return bad_state(engine)
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("layout", "kind"), [(Layout(dp=2, zero_stage=1), "exp_avg_sq"), (Layout(dp=2, zero_stage=3), "weight")], ids=str
)
def test_a_state_that_is_not_finite_is_found_on_its_rank(pool: Pool, layout: Layout, kind: str) -> None:
    for found in pool.run(state_with_infinity, 2, layout, kind):
        assert (found.name, found.rank, found.kind) == ("head.weight", 1, kind)


def config_of(folder: Path, name: str, **sections: dict[str, Any]) -> RunConfig:
    made = run_config(
        "llama",
        Layout(),
        model={"num_layers": 1, "vocab_size": 300},
        data={"train": str(folder / "data"), "seq_len": 16},
        **{
            "train": {
                "steps": 6,
                "log_every": 4,
                "global_batch_size": 4,
                "micro_batch_size": 4,
                "max_skipped_steps": 2,
            },
            "checkpoint": {"save_every": 1, "background": False},
            **sections,
        },
    )
    return made.model_copy(update={"folder": str(folder / "runs"), "name": name})


def run_until_it_ends(config: RunConfig, bad_steps: list[int], loss_of: dict[int, float]) -> str:
    """A whole run whose gradients are NaN in some steps, and whose losses are said to be others in some."""
    from dataclasses import replace

    from megatrain.data.feed.training import TrainingData
    from megatrain.engine.errors import NonFiniteError
    from megatrain.train.loop import train
    from megatrain.train.run import _claimed_folder

    engine = build_engine(config)
    step_now = [0]
    weight = dict(engine.parameters)["layers.0.feed_forward.down.weight"]
    weight.register_hook(lambda gradient: gradient * (torch.nan if step_now[0] in bad_steps else 1.0))
    train_step = engine.train_step

    def stepped(batch: Any, step: int) -> Any:
        step_now[0] = step
        result = train_step(batch, step)
        return replace(result, loss=torch.tensor(loss_of[step])) if step in loss_of else result

    engine.train_step = stepped
    try:
        with _claimed_folder(config) as lock:
            train(config, engine, TrainingData(config, 300), {}, lock)
        return ""
    except NonFiniteError as error:
        return str(error)
    finally:
        engine.close()


def records(folder: Path, name: str, kind: str) -> list[dict[str, Any]]:
    lines = (folder / f"runs/{name}/metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def steps_on_disk(folder: Path, name: str) -> list[str]:
    return [path.name for path in list_checkpoints(folder / f"runs/{name}/checkpoints")]


@pytest.fixture
def folder(memory_path: Path) -> Path:
    make_dataset(memory_path / "data", vocab_size=300)
    return memory_path


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_so_many_bad_steps_in_a_row_end_the_run(pool: Pool, folder: Path, dtype: str) -> None:
    config = config_of(folder, "a", precision={"dtype": dtype})
    (text,) = pool.run(run_until_it_ends, 1, config, [2, 4, 5], {})
    assert text.startswith(
        f"step 5: gradients are not finite in {dtype}, in 2 steps in a row; the first one in the backward pass is of "
        "layers.0.feed_forward.down.weight, on rank 0. The last step with finite gradients was 3: loss "
    )
    assert f"A new start goes on from {folder}/runs/a/checkpoints/step-00000003; lower optimizer.lr" in text
    assert steps_on_disk(folder, "a") == ["step-00000001", "step-00000003"], "nothing was saved while it went wrong"
    assert [(row["step"], row["num_skipped"], row["skipped"]) for row in records(folder, "a", "step")] == [
        (1, 0, False), (4, 2, True),
    ]  # fmt: skip


def test_a_run_that_ends_in_bad_steps_does_not_pass_for_done(pool: Pool, folder: Path) -> None:
    (text,) = pool.run(run_until_it_ends, 1, config_of(folder, "a"), [6], {})
    assert text.startswith("step 6: gradients are not finite in fp32; the first one")
    (text,) = pool.run(run_until_it_ends, 1, config_of(folder, "b"), [], {6: float("nan"), 3: float("inf")})
    assert text.startswith("step 6, the last one, was not saved: the loss of step 6 is nan, in fp32. The last step")
    assert "step-00000005" in text
    assert steps_on_disk(folder, "b") == [f"step-0000000{step}" for step in (1, 2, 4, 5)]
    failed = [row for row in records(folder, "b", "checkpoint") if row["failed"]]
    assert [row["problem"] for row in failed] == ["the loss of step 3 is inf", "the loss of step 6 is nan"]


def test_fp16_may_search_its_loss_scale_longer_than_a_few_steps(pool: Pool, folder: Path) -> None:
    """From 65536 down to 1 in 16 halvings, and the overflow at 1 is the loss scale's to report."""
    default = RunConfig()
    assert default.train.max_skipped_steps > np.log2(default.precision.initial_loss_scale)
    fp16 = {"dtype": "fp16", "initial_loss_scale": 4.0, "min_loss_scale": 1.0}
    (text,) = pool.run(run_until_it_ends, 1, config_of(folder, "a", precision=fp16), [2, 3], {})
    assert text.startswith("step 3: gradients are not finite in fp16, in 2 steps in a row")
