"""Mixture of experts: many ranks and axes at once give the losses, norms, weights and routing of one process.

Two axes at a time, and every feature with this one, are in tests/parallel/test_matrix.py.
"""

import functools
from dataclasses import replace
from typing import Any

import pytest

from megatrain.config.pipeline_schedules import PIPELINE_SCHEDULES
from tests.layouts import ONE_PROCESS, Layout, Trained, padded_batch, train, worst_state_error
from tests.parallel.test_layouts import LOSS, NORM
from tests.pool import Pool

# Every feature of the router is in one of the two models. Epsilon: the choice of experts is a step function, so
# weights must not differ by more than rounding; with a large one AdamW's first steps are smooth in the gradient,
# where lr * g / |g| would turn the rounding of a gradient near zero into a step of full length.
OPTIMIZER = {"eps": 1e-2}
WEIGHT = 1e-5  # so the weights follow as closely as the losses
COMMON: dict[str, Any] = {"num_layers": 4, "experts.num_dense_layers": 1, "experts.hidden_size": 16, "dropout": 0.1}
MODELS: dict[str, dict[str, Any]] = {
    "llama": COMMON
    | {
        "experts.num_experts": 4,
        "experts.per_token": 2,
        "experts.num_shared": 1,
        "router.balance_loss": 0.1,
        "router.z_loss": 0.01,
    },
    "gpt": COMMON
    | {
        "experts.num_experts": 8,
        "experts.per_token": 3,
        "router.score": "sigmoid",
        "router.scale": 1.5,
        "router.groups": 4,
        "router.groups_per_token": 2,
        "router.balance_rate": 0.01,
        "router.balance_loss": 0.01,
        "experts.capacity": 1.0,
    },
}
# The sequences are padded, as what is counted over one depends on how much of it is no padding.
SECTIONS: dict[str, dict[str, Any]] = {
    family: {"model": model, "optimizer": OPTIMIZER, "batch_of": padded_batch} for family, model in MODELS.items()
}


def layouts() -> list[Layout]:
    """Experts over data and context ranks, beside every other axis."""
    found = []
    for ep in (1, 2, 4):
        for tp, pp, dp, cp in [(t, p, d, c) for t in (1, 2) for p in (1, 2) for d in (1, 2, 4) for c in (1, 2)]:
            if dp * cp % ep or tp * pp * dp * cp > 8:
                continue
            for zero_stage in (3,) if pp == 1 and ep == 1 else (0, 2) if pp == 1 else (1,):
                layout = Layout(tp, pp, dp, False, zero_stage, cp=cp, ep=ep)
                found.append(layout)
                if tp > 1:
                    found.append(replace(layout, sequence_parallel=True))
    found += [replace(layout, cp_method="ulysses") for layout in found if layout.cp > 1 and layout.ep == 4]
    return found + [Layout(2, 2, 2, True, 1, schedule, ep=2) for schedule in PIPELINE_SCHEDULES if schedule != "1f1b"]


DEFAULT = {
    ("llama", Layout(1, 1, 4, False, 2, ep=2)),
    ("gpt", Layout(2, 2, 2, True, 1, "zbv", ep=2)),
    ("gpt", Layout(1, 2, 2, False, 1, cp=2, ep=4)),
}


def cases() -> list:
    """All behind the marker; by default copies of experts, four expert ranks, and all axes at once."""
    return [
        pytest.param(
            family, layout, id=f"{family}-{layout}", marks=() if (family, layout) in DEFAULT else pytest.mark.slow
        )
        for family in MODELS
        for layout in layouts()
    ]


@functools.cache
def one_process(pool: Pool, family: str) -> Trained:
    return pool.run(train, 1, family, ONE_PROCESS, **SECTIONS[family])[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("llama", Layout(cp=2, ep=2, zero_stage=1)),
        ("gpt", Layout(cp=2, ep=2, zero_stage=1)),
        ("llama", Layout(tp=2, sequence_parallel=True, zero_stage=1)),
    ],
    ids=str,
)
def test_compiled_parts_talk_to_other_ranks(pool: Pool, family: str, layout: Layout) -> None:
    """A compiled router sums over the ranks that share a sequence, and its gradient over those that share a tensor."""
    reference = one_process(pool, family)
    ranks = pool.run(train, layout.world_size, family, layout, train={"compile": True}, **SECTIONS[family])
    assert ranks[0].losses == pytest.approx(reference.losses, rel=LOSS)
    error, name = worst_state_error(ranks, reference)
    assert error < WEIGHT, f"{name} differs by {error:.1e}"


@pytest.mark.parametrize(("family", "layout"), cases())
def test_experts_equal_one_process(pool: Pool, family: str, layout: Layout) -> None:
    reference = one_process(pool, family)
    ranks = pool.run(train, layout.world_size, family, layout, **SECTIONS[family])
    for trained in ranks:
        for step, (own, expected) in enumerate(zip(trained.routing, reference.routing, strict=True)):
            for layer, values in expected.items():
                for name, value in values.items():
                    assert own[layer][name] == pytest.approx(value, rel=LOSS), f"step {step + 1}, {layer}: {name}"
        assert trained.losses == pytest.approx(reference.losses, rel=LOSS)
        assert trained.grad_norms == pytest.approx(reference.grad_norms, rel=NORM)
        assert trained.evaluation == pytest.approx(reference.evaluation, rel=LOSS)
    error, name = worst_state_error(ranks, reference)
    assert error < WEIGHT, f"{name} differs by {error:.1e}"
    error, name = worst_state_error(ranks, reference, "exp_avg")
    assert error < 1e-4, f"the gradients of {name} differ by {error:.1e}"
