"""BERT in layouts that split its parts: the numbers of one process."""

import functools
from pathlib import Path
from typing import Any

import pytest

from tests.layouts import (
    ONE_PROCESS,
    VOCAB_SIZE,
    Layout,
    Trained,
    build_engine,
    padded_batch,
    run_config,
    train,
    worst_state_error,
)
from tests.parallel.test_layouts import LOSS, NORM, WEIGHT
from tests.pool import Pool

SECTIONS = {
    "model": {"tie_embeddings": True, "num_layers": 4, "vocab_size": VOCAB_SIZE + 4, "vocab_padding": 4,
              "dropout": 0.1, "attention.dropout": 0.1},
    "data": {"objective": "masked", "mask_token": VOCAB_SIZE - 1},
}  # fmt: skip
# the bias of the vocabulary over tensor ranks, the norms and the head's layer on parts of the sequence; both ends on
# stages of their own, and on one rank; weights that the head reads without its module, sharded
LAYOUTS = [
    Layout(tp=2, sequence_parallel=True, zero_stage=1),
    Layout(tp=2, pp=2, zero_stage=1),
    Layout(pp=2, schedule="zbv", zero_stage=1),
    Layout(dp=2, zero_stage=2),
    Layout(tp=2, dp=2, sequence_parallel=True, zero_stage=3),
    Layout(cp=2, cp_method="ulysses", dp=2, zero_stage=3),
]


@functools.cache
def one_process(pool: Pool, documents: bool) -> Trained:
    return pool.run(train, 1, "bert", ONE_PROCESS, documents=documents, batch_of=padded_batch, **SECTIONS)[0]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_bert_in_any_layout_equals_one_process(pool: Pool, layout: Layout, documents: bool) -> None:
    reference = one_process(pool, documents)
    arguments = {"documents": documents, "batch_of": padded_batch, **SECTIONS}
    ranks = pool.run(train, layout.world_size, "bert", layout, **arguments)
    for trained in ranks:
        assert trained.losses == pytest.approx(reference.losses, rel=LOSS)
        assert trained.grad_norms == pytest.approx(reference.grad_norms, rel=NORM)
        assert trained.evaluation == pytest.approx(reference.evaluation, rel=LOSS)
    error, name = worst_state_error(ranks, reference)
    assert error < WEIGHT, name


def steps(engine: Any, first: int, last: int) -> list[float]:
    share = engine.mesh.coordinate("dp"), engine.mesh.topology.dp
    results = [engine.train_step(padded_batch(step, *share), step) for step in range(first, last + 1)]
    return [float(number) for result in results for number in (result.loss, result.grad_norm)]


def saved_after_two_steps(layout: Layout, folder: str) -> tuple[str, list[float]]:
    """The checkpoint, and losses and norms of two steps more."""
    from megatrain.checkpoint.save import save_checkpoint

    engine = build_engine(run_config("bert", layout, **SECTIONS))
    try:
        steps(engine, 1, 2)
        return str(save_checkpoint(engine, Path(folder), 2, "test", {})), steps(engine, 3, 4)
    finally:
        engine.close()


def gone_on(layout: Layout, path: str) -> list[float]:
    from megatrain.checkpoint.load import load_checkpoint

    engine = build_engine(run_config("bert", layout, **SECTIONS))
    try:
        load_checkpoint(engine, Path(path), lambda data, step: None)
        return steps(engine, 3, 4)
    finally:
        engine.close()


def test_a_checkpoint_goes_on_in_another_layout(pool: Pool, memory_path: Path) -> None:
    first = Layout(tp=2, sequence_parallel=True, zero_stage=1)
    path, whole = pool.run(saved_after_two_steps, 2, first, str(memory_path))[0]
    for layout in (Layout(dp=2, zero_stage=3), Layout(pp=2)):
        assert pool.run(gone_on, 2, layout, path)[0] == pytest.approx(whole, rel=NORM)
