"""Context parallelism: who holds which positions, and that many ranks and axes at once give one process's numbers.

Two axes at a time, and every feature with this one, are in tests/parallel/test_matrix.py.
"""

import functools
from dataclasses import replace

import pytest
import torch

from megatrain.config.pipeline_schedules import PIPELINE_SCHEDULES
from tests.layouts import ONE_PROCESS, Layout, Trained, train, worst_state_error
from tests.parallel.test_layouts import LOSS, NORM, WEIGHT
from tests.pool import Pool

# masks that depend on positions and heads: a rank that is wrong about either has other losses
DROPOUT = {"dropout": 0.1, "attention.dropout": 0.1}
# what each family has in the layouts: llama one key/value head for four queries, which no axis divides
MODELS = {"gpt": {"attention.num_kv_heads": 4}, "llama": {"attention.num_kv_heads": 1}}


def layouts(family: str) -> list[Layout]:
    """Every axis beside each method; several tensor ranks need as many key/value heads."""
    found = []
    tensor = (1, 2) if family == "gpt" else (1,)
    for method in ("all_gather", "ulysses"):
        for cp, tp, pp, dp in [(c, t, p, d) for c in (2, 4) for t in tensor for p in (1, 2) for d in (1, 2)]:
            if cp * tp * pp * dp > 8 or (method == "ulysses" and 4 % (cp * tp)):
                continue
            for zero_stage in (1, 3) if pp == 1 else (1,):
                layout = Layout(tp, pp, dp, False, zero_stage, cp=cp, cp_method=method)
                found.append(layout)
                if tp > 1:
                    found.append(replace(layout, sequence_parallel=True))
    scheduled = [Layout(1, 2, 2, False, 1, schedule, cp=2) for schedule in PIPELINE_SCHEDULES if schedule != "1f1b"]
    return found + scheduled


DEFAULT = {
    ("gpt", Layout(cp=4, zero_stage=3, cp_method="ulysses")),
    ("gpt", Layout(2, 2, 1, True, 1, cp=2)),
    ("llama", Layout(1, 1, 2, False, 3, cp=2)),
}


def cases() -> list:
    """All behind the marker; by default four ranks of Ulysses, three axes, and ZeRO 3 over data and context ranks."""
    return [
        pytest.param(
            family, layout, id=f"{family}-{layout}", marks=() if (family, layout) in DEFAULT else pytest.mark.slow
        )
        for family in ("gpt", "llama")
        for layout in layouts(family)
    ]


@functools.cache
def one_process(pool: Pool, family: str) -> Trained:
    return pool.run(train, 1, family, ONE_PROCESS, model=MODELS[family] | DROPOUT)[0]


@pytest.mark.parametrize(("family", "layout"), cases())
def test_context_equals_one_process(pool: Pool, family: str, layout: Layout) -> None:
    reference = one_process(pool, family)
    ranks = pool.run(train, layout.world_size, family, layout, model=MODELS[family] | DROPOUT)
    for trained in ranks:
        assert trained.losses == pytest.approx(reference.losses, rel=LOSS)
        assert trained.grad_norms == pytest.approx(reference.grad_norms, rel=NORM)
        assert trained.evaluation == pytest.approx(reference.evaluation, rel=LOSS)
    error, name = worst_state_error(ranks, reference)
    assert error < WEIGHT, f"{name} differs by {error:.1e}"


def positions(method: str) -> tuple[list[int], list[int]]:
    """This rank's positions of 16, and what ``in_order`` makes of all ranks' positions. All know of 16."""
    from megatrain.parallel.context import build_context
    from megatrain.parallel.layers import Layers
    from megatrain.parallel.mesh import build_mesh, topology_of
    from tests.layouts import run_config

    parallel = run_config("gpt", Layout(cp=4, cp_method=method)).parallel
    context = build_context(parallel, build_mesh(topology_of(parallel), torch.device("cpu")))
    assert Layers(context).sequence_length(4) == 16, "what some rotary frequencies depend on"
    own = context.positions(4)
    return own.tolist(), context.in_order(own).tolist()


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("all_gather", [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]),
        ("ulysses", [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]),
    ],
)
def test_positions_of_each_rank(pool: Pool, method: str, expected: list[list[int]]) -> None:
    ranks = pool.run(positions, 4, method)
    assert [own for own, _ in ranks] == expected
    assert all(ordered == list(range(16)) for _, ordered in ranks)
