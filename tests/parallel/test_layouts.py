"""Any layout, same numbers: losses, gradient norms and every weight equal those of one process."""

import functools
from typing import Any

import pytest

from megatrain.config.pipeline_schedules import PIPELINE_SCHEDULES
from tests.layouts import LEARNING_RATE, ONE_PROCESS, VOCAB_SIZE, Layout, Trained, train, worst_state_error
from tests.pool import Pool

# FP32: sums over ranks and micro-batches in another order than one process adds them; eps is 1.2e-7 and
# sums have up to 10^4 terms.
LOSS, NORM = 1e-5, 2e-5
# AdamW's first steps move a weight by lr * g / |g|: where a gradient is zero but for rounding, the direction
# is rounding too. lr is 1e-2 of weights of 0.1, so a few such elements show.
WEIGHT = 5e-3


# every option of the model that the families' own defaults leave out
OPTIONS = {
    "attention.head_width": 16,
    "attention.bias": True,
    "vocab_size": VOCAB_SIZE + 4,
    "vocab_padding": 4,
    "tie_embeddings": True,
    "rope.scaling": "llama3",
    "rope.factor": 4.0,
    "rope.original_max_seq_len": 8,
}


def all_layouts() -> list[Layout]:
    layouts = []
    for tp, pp, dp in [(t, p, d) for t in (1, 2) for p in (1, 2) for d in (1, 2, 4, 8) if t * p * d <= 8]:
        for sequence_parallel in (False, True) if tp > 1 else (False,):
            for zero_stage in range(4) if pp == 1 else range(2):
                layouts.append(Layout(tp, pp, dp, sequence_parallel, zero_stage))
    return layouts + [Layout(pp=2, schedule=schedule) for schedule in PIPELINE_SCHEDULES if schedule != "1f1b"]


def schedule_cases() -> list:
    """Every schedule with each other axis; in the default run each axis meets a V and a loop."""
    default = {("zbv", 2, 1), ("dualpipev", 1, 2), ("interleaved_zero_bubble", 2, 2), ("interleaved_1f1b", 2, 2)}
    cases = []
    for family in ("gpt", "llama"):
        for schedule in PIPELINE_SCHEDULES:
            for tp, dp in ((2, 1), (1, 2), (2, 2)):
                layout = Layout(tp, 2, dp, tp > 1, zero_stage=int(dp > 1), schedule=schedule)
                chosen = family == "gpt" and (schedule, tp, dp) in default
                marks = () if chosen else pytest.mark.slow
                cases.append(pytest.param(family, layout, None, id=f"{family}-{layout}", marks=marks))
            deep = Layout(pp=4, dp=2, zero_stage=1, schedule=schedule)
            cases.append(pytest.param(family, deep, 8, id=f"{family}-{deep}", marks=pytest.mark.slow))
    return cases


@functools.cache
def one_process(
    pool: Pool, family: str, num_layers: int = 3, documents: bool = False, lr: float = LEARNING_RATE
) -> Trained:
    sections: dict[str, Any] = {"model": options(family, num_layers), "optimizer": {"lr": lr}}
    return pool.run(train, 1, family, ONE_PROCESS, documents=documents, **sections)[0]


def options(family: str, num_layers: int) -> dict[str, Any]:
    return {"num_layers": num_layers, **(OPTIONS if family == "qwen3" else {})}


def cases() -> list:
    """Two families in every layout; the third, which has nothing but options of its own, in those that mix axes."""
    mixed = [Layout(tp=2, dp=2, zero_stage=3), Layout(tp=2, pp=2, dp=2, sequence_parallel=True, zero_stage=1)]
    layouts = {"gpt": all_layouts(), "llama": all_layouts(), "qwen3": mixed}
    return [pytest.param(family, layout, id=f"{family}-{layout}") for family in layouts for layout in layouts[family]]


@pytest.mark.parametrize(("family", "layout"), cases())
def test_layout_equals_one_process(pool: Pool, family: str, layout: Layout) -> None:
    check_equal(pool, family, layout)


@pytest.mark.parametrize(("family", "layout", "num_layers"), schedule_cases())
def test_schedule_equals_one_process(pool: Pool, family: str, layout: Layout, num_layers: int) -> None:
    if layout.pp == 2:
        check_equal(pool, family, layout, num_layers)
    else:
        # at the other learning rate, eight layers blow rounding up: one process differs from itself, with micro-batches
        # of another size, by 2e-3 in the norm of the fifth step
        check_equal(pool, family, layout, num_layers, lr=LEARNING_RATE / 5, train={"micro_batch_size": 1})


DOCUMENT_LAYOUTS = [
    Layout(dp=2, zero_stage=3),
    Layout(tp=2, pp=2, dp=2, sequence_parallel=True, zero_stage=1),
    Layout(cp=2, dp=2, zero_stage=1),
    Layout(cp=2, pp=2, cp_method="ulysses"),
]


@pytest.mark.parametrize("layout", DOCUMENT_LAYOUTS, ids=str)
@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_documents_in_any_layout_equal_one_process(pool: Pool, family: str, layout: Layout) -> None:
    assert one_process(pool, family, documents=True).losses != pytest.approx(one_process(pool, family).losses, rel=LOSS)
    check_equal(pool, family, layout, documents=True)


@pytest.mark.parametrize("layout", [DOCUMENT_LAYOUTS[1], DOCUMENT_LAYOUTS[3]], ids=str)
def test_documents_one_by_one_in_any_layout_equal_the_dense_mask(pool: Pool, layout: Layout) -> None:
    model = {**options("llama", 3), "attention.documents": "per_document"}
    check_equal(pool, "llama", layout, documents=True, model=model)


def check_equal(
    pool: Pool,
    family: str,
    layout: Layout,
    num_layers: int | None = None,
    documents: bool = False,
    lr: float = LEARNING_RATE,
    **sections: Any,
) -> None:
    # no even split over the stages of two ranks
    num_layers = num_layers or (3 if layout.stages_per_rank == 1 else 5)
    reference = one_process(pool, family, num_layers, documents, lr)
    sections = {"model": options(family, num_layers), "optimizer": {"lr": lr}, **sections}
    ranks = pool.run(train, layout.world_size, family, layout, documents=documents, **sections)
    for trained in ranks:
        assert trained.losses == pytest.approx(reference.losses, rel=LOSS)
        assert trained.sequence_losses == pytest.approx(reference.sequence_losses, rel=LOSS)
        assert trained.grad_norms == pytest.approx(reference.grad_norms, rel=NORM)
        assert trained.evaluation == pytest.approx(reference.evaluation, rel=LOSS)
    error, name = worst_state_error(ranks, reference)
    assert error < WEIGHT, f"{name} differs by {error:.1e}"
