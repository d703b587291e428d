"""The layout-free state: what ranks hold of a parameter are the pieces of one whole, and what is written is read."""

import pytest
import torch
from torch import Tensor

from tests.layouts import Layout, build_engine, run_config
from tests.pool import Pool

COUNT = 7


def content(kind: str, name: str, size: int) -> Tensor:
    """[size]: numbers that tell kind, parameter and place; none negative, as a second moment must be."""
    start = sum(map(ord, kind + name)) % 97
    return (start + torch.arange(size) / size).float()


def written(zero_stage: int) -> tuple[list[tuple[str, str, int, int]], dict[tuple[str, str], Tensor], int, list[str]]:
    """This rank's pieces (kind, name, first element, elements), the whole state after it was written, the updates, and
    the names of weights that the next step would use otherwise."""
    from megatrain.engine.state import (
        export_state,
        finish_import,
        kinds_of,
        local_fragments,
        optimizer_step_count,
        prepare_import,
        set_optimizer_step_count,
    )

    engine = build_engine(run_config("llama", Layout(dp=2, zero_stage=zero_stage), model={"num_layers": 1}))
    try:
        assert all(f.values("exp_avg").count_nonzero() == 0 for f in local_fragments(engine)), "not made, so zeros"
        prepare_import(engine)
        pieces = []
        for fragment in local_fragments(engine):
            for kind in kinds_of(engine, fragment.parameter):
                whole = content(kind, fragment.name, fragment.shape.numel())
                fragment.set(kind, whole[fragment.start : fragment.start + fragment.size])
                pieces.append((kind, fragment.name, fragment.start, fragment.size))
        finish_import(engine)
        set_optimizer_step_count(engine, COUNT)
        for fragment in local_fragments(engine):
            own = content("weight", fragment.name, fragment.shape.numel())[fragment.start :][: fragment.size]
            assert torch.equal(fragment.values("weight").cpu(), own)
        state = {(kind, name): tensor.flatten().clone() for kind, name, tensor in export_state(engine)}
        stale = []
        if zero_stage < 3:  # there a rank holds the step's weights whole
            weights = ((name, p.detach().float().flatten()) for name, p in engine.parameters)
            stale = [name for name, w in weights if not torch.equal(w, content("weight", name, w.numel()))]
        return pieces, state, optimizer_step_count(engine), stale
    finally:
        engine.close()


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_pieces_make_the_whole_and_what_is_written_is_read(pool: Pool, zero_stage: int) -> None:
    ranks = pool.run(written, 2, zero_stage)
    states = [state for _, state, _, _ in ranks]
    assert {kind for kind, _ in states[0]} == {"weight", "exp_avg", "exp_avg_sq"}
    for pieces, state, count, stale in ranks:
        assert count == COUNT and stale == []
        assert {(kind, name) for kind, name, *_ in pieces} <= state.keys() == states[0].keys()
        for (kind, name), found in state.items():
            assert torch.equal(found, content(kind, name, found.numel())), (kind, name)
    for key, whole in states[0].items():
        ends = [sorted((at, at + size) for *of, at, size in pieces if tuple(of) == key) for pieces, *_ in ranks]
        if zero_stage == 0:
            assert ends == [[(0, whole.numel())]] * 2, "each holds all"
        else:
            run = [0, *(end for own in ends for piece in own for end in piece), whole.numel()]
            assert run[::2] == run[1::2], "no gap, nothing twice"
