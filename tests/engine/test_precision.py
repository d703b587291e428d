"""BF16 and FP16: every layout near one process; an overflow skips the step on all ranks at once."""

import unittest.mock
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.layouts import ONE_PROCESS, Layout, Trained, build_engine, global_batch, run_config, train, train_steps
from tests.pool import Pool

LAYOUTS = [
    Layout(dp=2, zero_stage=1),
    Layout(dp=2, zero_stage=2),
    Layout(tp=2, pp=2, sequence_parallel=True, zero_stage=0),
    Layout(pp=2, dp=2, zero_stage=1),
    Layout(pp=2, dp=2, zero_stage=1, schedule="zbv"),
]
# (loss, norm), relative. A 16-bit activation is rounded by 2^-9 (BF16) or 2^-12 (FP16), and a tensor split rounds
# partial sums that one process does not have; the loss averages over 200 tokens, the norm of later steps also holds
# what the rounding did to AdamW's steps (lr 1e-2).
BANDS = {"bf16": (1e-3, 3e-2), "fp16": (5e-4, 1e-2)}


@pytest.mark.parametrize("dtype", BANDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layout_is_near_one_process(pool: Pool, dtype: str, layout: Layout) -> None:
    reference = pool.run(train, 1, "llama", ONE_PROCESS, 3, precision={"dtype": dtype})[0]
    loss, norm = BANDS[dtype]
    for trained in pool.run(train, layout.world_size, "llama", layout, 3, precision={"dtype": dtype}):
        assert trained.losses == pytest.approx(reference.losses, rel=loss)
        assert trained.grad_norms == pytest.approx(reference.grad_norms, rel=norm)
        assert not any(trained.skipped)


@pytest.mark.parametrize("layout", [Layout(tp=2, pp=2), Layout(pp=2, dp=2, zero_stage=1)], ids=str)
def test_overflow_skips_together_and_halves_the_scale(pool: Pool, layout: Layout) -> None:
    precision = {"dtype": "fp16", "initial_loss_scale": 2.0**32}
    for trained in pool.run(train, layout.world_size, "llama", layout, 3, precision=precision):
        assert trained.skipped == [True] * 3
        assert trained.loss_scales == [2.0**32, 2.0**31, 2.0**30]


def test_a_split_backward_sums_in_fp32(pool: Pool) -> None:
    """The same 16-bit gradients of micro-batches, summed in FP32, whichever hook or hand adds them."""
    same = {"precision": {"dtype": "bf16"}, "train": {"micro_batch_size": 2}}
    whole, split = (
        pool.run(train, 2, "gpt", Layout(pp=2, schedule=schedule), 2, **same)[0] for schedule in ("1f1b", "zbv")
    )
    assert split.losses == pytest.approx(whole.losses, rel=1e-6)
    assert split.grad_norms == pytest.approx(whole.grad_norms, rel=1e-5)  # FP32 sums in another order


def train_as_deepspeed_adds(*args: Any, **kwargs: Any) -> Trained:
    """With an FP32 copy of each gradient."""
    from megatrain.engine.zero.partitions import BF16Runtime, Stage1And2Runtime

    with (
        unittest.mock.patch.object(BF16Runtime, "_add_without_copies"),
        unittest.mock.patch.object(Stage1And2Runtime, "_add_without_copies"),
    ):
        return train(*args, **kwargs)


@pytest.mark.parametrize("dtype", BANDS)
def test_gradients_are_added_without_a_copy_to_the_same_bits(pool: Pool, dtype: str) -> None:
    layout = Layout(dp=2, zero_stage=1)
    with_copies = pool.run(train_as_deepspeed_adds, 2, "llama", layout, 3, precision={"dtype": dtype})
    without = pool.run(train, 2, "llama", layout, 3, precision={"dtype": dtype})
    for ours, theirs in zip(without, with_copies, strict=True):
        assert ours.losses == theirs.losses and ours.grad_norms == theirs.grad_norms
        for key, (part, _) in theirs.state.items():
            assert np.array_equal(ours.state[key][0], part), key


def train_until_it_stops(layout: Layout, precision: dict[str, Any]) -> str:
    from megatrain.engine.errors import LossScaleError

    engine = build_engine(run_config("llama", layout, precision=precision))
    try:
        train_steps(engine, 1, 5)
    except LossScaleError as error:
        return str(error)
    finally:
        engine.close()
    return ""


def test_an_overflow_at_the_smallest_scale_ends_the_run_on_every_rank(pool: Pool) -> None:
    precision = {"dtype": "fp16", "initial_loss_scale": 2.0**32, "min_loss_scale": 2.0**31}
    for message in pool.run(train_until_it_stops, 2, Layout(pp=2), precision):
        assert message.startswith("step 2: FP16 gradients overflow at the smallest loss scale")
        assert "set precision.dtype to bf16" in message


@pytest.mark.parametrize(
    ("options", "scales"),
    [
        ({"initial_loss_scale": 2.0**32, "loss_scale_hysteresis": 2}, [2.0**32, 2.0**32, 2.0**31, 2.0**30]),
        ({"initial_loss_scale": 1024.0, "loss_scale_window": 2}, [1024.0, 1024.0, 1024.0, 2048.0]),
    ],
    ids=["hysteresis", "window"],
)
def test_the_scale_follows_its_options(pool: Pool, options: dict[str, float], scales: list[float]) -> None:
    trained = pool.run(train, 1, "llama", ONE_PROCESS, 4, precision={"dtype": "fp16", **options})[0]
    assert trained.loss_scales == scales


@pytest.mark.parametrize("layout", [Layout(dp=2, zero_stage=1), Layout(pp=2, dp=2)], ids=str)
def test_gradients_may_be_summed_in_the_compute_type(pool: Pool, layout: Layout) -> None:
    wide, narrow = (
        pool.run(train, layout.world_size, "llama", layout, 2, precision={"dtype": "bf16", "gradient_dtype": dtype})[0]
        for dtype in ("fp32", "compute")
    )
    assert narrow.losses[0] == wide.losses[0]
    assert narrow.grad_norms[0] != wide.grad_norms[0]
    assert narrow.grad_norms == pytest.approx(wide.grad_norms, rel=BANDS["bf16"][1])


def reduced_types(zero_stage: int, precision: dict[str, Any]) -> set[str]:
    """Types of the large tensors that a step sums over ranks; without tensor ranks these are gradients."""
    import deepspeed.comm.comm

    engine = build_engine(run_config("llama", Layout(dp=2, zero_stage=zero_stage), precision=precision))
    seen: set[str] = set()

    def spied(owner: Any, name: str) -> Any:
        reduce = getattr(owner, name)

        def spy(*arguments: Any, **options: Any) -> Any:
            tensors = [value for value in (*arguments, *options.values()) if isinstance(value, torch.Tensor)]
            seen.update(str(tensor.dtype) for tensor in tensors if tensor.numel() > 1000)
            return reduce(*arguments, **options)

        return unittest.mock.patch.object(owner, name, spy)

    try:
        scatter = spied(deepspeed.comm.comm.cdb, "reduce_scatter_function")  # bound when the world began
        with spied(dist, "all_reduce"), spied(dist, "reduce"), scatter:
            engine.train_step(global_batch(1, engine.mesh.coordinate("dp"), 2), 1)
    finally:
        engine.close()
    return seen


@pytest.mark.parametrize("zero_stage", range(4))
@pytest.mark.parametrize(
    ("gradient_dtype", "expected"), [("fp32", {"torch.float32"}), ("compute", {"torch.bfloat16"})], ids=str
)
def test_gradients_cross_ranks_in_the_type_asked_for(
    pool: Pool, zero_stage: int, gradient_dtype: str, expected: set[str]
) -> None:
    precision = {"dtype": "bf16", "gradient_dtype": gradient_dtype}
    assert pool.run(reduced_types, 2, zero_stage, precision) == [expected] * 2


def test_fp32_residual_and_logits(pool: Pool) -> None:
    exact = pool.run(train, 1, "llama", ONE_PROCESS, 1)[0]
    layout = Layout(tp=2, pp=2, sequence_parallel=True)
    wide = {"dtype": "bf16", "residual_dtype": "fp32", "logits_dtype": "fp32"}
    plain = pool.run(train, 1, "llama", ONE_PROCESS, 1, precision={"dtype": "bf16"})[0]
    alone = pool.run(train, 1, "llama", ONE_PROCESS, 1, precision=wide)[0]
    split = pool.run(train, 4, "llama", layout, 1, precision=wide)[0]
    assert alone.losses != plain.losses
    assert abs(alone.grad_norms[0] - exact.grad_norms[0]) < 1e-2 * exact.grad_norms[0]
    assert split.losses == pytest.approx(alone.losses, rel=BANDS["bf16"][0])
    assert split.grad_norms == pytest.approx(alone.grad_norms, rel=BANDS["bf16"][1])
