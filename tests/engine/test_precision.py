"""BF16 and FP16: every layout near one process; an overflow skips the step on all ranks at once."""

import pytest

from tests.layouts import ONE_PROCESS, Layout, train
from tests.pool import Pool

LAYOUTS = [
    Layout(dp=2, zero_stage=1),
    Layout(dp=2, zero_stage=2),
    Layout(tp=2, pp=2, sequence_parallel=True, zero_stage=0),
    Layout(pp=2, dp=2, zero_stage=1),
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
