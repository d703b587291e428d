"""Blocks with and without windows, in layouts that split positions, heads and blocks, give one process's numbers."""

import functools

import pytest

from tests.layouts import ONE_PROCESS, Layout, Trained, train, worst_state_error
from tests.parallel.test_layouts import LOSS, NORM, WEIGHT
from tests.pool import Pool

MODEL = {"blocks": ["window", "full"], "attention.window": 5, "dropout": 0.1, "attention.dropout": 0.1}
# halves of the sequence on each rank, heads of a rank, and stages that hold other patterns than the first
LAYOUTS = [
    Layout(cp=2, tp=2, sequence_parallel=True, zero_stage=1),
    Layout(cp=2, cp_method="ulysses", dp=2, zero_stage=3),
    Layout(pp=2, schedule="zbv", zero_stage=1),
]


@functools.cache
def one_process(pool: Pool, documents: bool) -> Trained:
    return pool.run(train, 1, "llama", ONE_PROCESS, documents=documents, model=MODEL)[0]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_windows_in_any_layout_equal_one_process(pool: Pool, layout: Layout, documents: bool) -> None:
    reference = one_process(pool, documents)
    ranks = pool.run(train, layout.world_size, "llama", layout, documents=documents, model=MODEL)
    for trained in ranks:
        assert trained.losses == pytest.approx(reference.losses, rel=LOSS)
        assert trained.grad_norms == pytest.approx(reference.grad_norms, rel=NORM)
        assert trained.evaluation == pytest.approx(reference.evaluation, rel=LOSS)
    error, name = worst_state_error(ranks, reference)
    assert error < WEIGHT, name
