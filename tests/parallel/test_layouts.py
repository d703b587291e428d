"""Any layout, same numbers: losses, gradient norms and every weight equal those of one process."""

import functools

import pytest

from tests.layouts import ONE_PROCESS, Layout, Trained, train, worst_state_error
from tests.pool import Pool

# FP32: sums over ranks and micro-batches in another order than one process adds them; eps is 1.2e-7 and
# sums have up to 10^4 terms.
LOSS, NORM = 1e-5, 2e-5
# AdamW's first steps move a weight by lr * g / |g|: where a gradient is zero but for rounding, the direction
# is rounding too. lr is 1e-2 of weights of 0.1, so a few such elements show.
WEIGHT = 5e-3


def all_layouts() -> list[Layout]:
    layouts = []
    for tp, pp, dp in [(t, p, d) for t in (1, 2) for p in (1, 2) for d in (1, 2, 4, 8) if t * p * d <= 8]:
        for sequence_parallel in (False, True) if tp > 1 else (False,):
            for zero_stage in range(4) if pp == 1 else range(2):
                layouts.append(Layout(tp, pp, dp, sequence_parallel, zero_stage))
    layouts += [
        Layout(pp=2, stages_per_rank=2),
        Layout(tp=2, pp=2, dp=2, sequence_parallel=True, zero_stage=1, stages_per_rank=2),
    ]
    return layouts


@functools.cache
def one_process(pool: Pool, family: str) -> Trained:
    return pool.run(train, 1, family, ONE_PROCESS)[0]


def cases() -> list:
    """Both families in every layout."""
    return [
        pytest.param(family, layout, id=f"{family}-{layout}") for family in ("gpt", "llama") for layout in all_layouts()
    ]


@pytest.mark.parametrize(("family", "layout"), cases())
def test_layout_equals_one_process(pool: Pool, family: str, layout: Layout) -> None:
    reference = one_process(pool, family)
    ranks = pool.run(train, layout.world_size, family, layout)
    for trained in ranks:
        assert trained.losses == pytest.approx(reference.losses, rel=LOSS)
        assert trained.grad_norms == pytest.approx(reference.grad_norms, rel=NORM)
        assert trained.evaluation == pytest.approx(reference.evaluation, rel=LOSS)
    error, name = worst_state_error(ranks, reference)
    assert error < WEIGHT, f"{name} differs by {error:.1e}"
