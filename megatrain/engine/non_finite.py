"""Where NaN and infinity stand: in the gradients of a step that was skipped, and in the state that is to be saved."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.engine.engine import Engine, RankBatch
from megatrain.engine.state import factors, kinds_of, local_fragments


@dataclass(frozen=True)
class Found:
    """A tensor that is not finite: the parameter's canonical name, the rank that holds it, and its ``kind`` (a moment
    or the weight; of a gradient "gradient")."""

    name: str
    rank: int
    kind: str = "gradient"


def bad_gradient(engine: Engine, batch: RankBatch) -> Found | None:
    """The first parameter, in the order of the backward pass, whose gradient of ``batch`` is not finite on some rank.

    Runs the passes of the step again, and looks before ranks sum their gradients: so the rank is the one where it
    arose. None: each is finite, then only the sum of their squares is not, or the passes did not repeat themselves.
    Leaves gradients behind, so the engine can make no step after it. Collective.
    """
    found: set[str] = set()

    def look(name: str, gradient: Tensor | None) -> None:
        if gradient is not None and not gradient.isfinite().all():
            found.add(name)

    # a pipeline's schedule may run the backward pass without hooks, and leaves sums of this rank alone
    hooked = engine.config.parallel.pp == 1
    handles = [p.register_hook(partial(look, name)) for name, p in engine.parameters if hooked and p.requires_grad]
    engine.accumulate(batch)
    for handle in handles:
        handle.remove()
    if not hooked:
        for name, parameter in engine.parameters:
            look(name, engine.runtime.accumulated_gradient(parameter))
    places = [(place, name, "gradient") for place, (name, _) in enumerate(engine.parameters) if name in found]
    return _first_of_all_ranks(places)


def bad_state(engine: Engine) -> Found | None:
    """A master weight or a moment that is not finite on some rank; None: the whole state is finite. Collective."""
    flags, places = [], []
    for place, (name, kind, values) in enumerate(_held(engine)):
        if values.numel():
            low, high = values.aminmax()  # NaN stays NaN, and no copy is made
            flags.append((low.isfinite() & high.isfinite()).to(engine.mesh.device))
            places.append((place, name, kind))
    finite = torch.stack(flags).tolist() if flags else []
    return _first_of_all_ranks([place for place, good in zip(places, finite, strict=True) if not good])


def _held(engine: Engine) -> Iterator[tuple[str, str, Tensor]]:
    """(name, kind, values) of all that this rank holds; what lies on a disk is read as it is asked for."""
    for fragment in local_fragments(engine):
        for kind in kinds_of(engine, fragment.parameter):
            yield fragment.name, kind, fragment.values(kind)
    for (kind, name), values in factors(engine).items():
        yield name, kind, values


def _first_of_all_ranks(own: list[tuple[int, str, str]]) -> Found | None:
    """Of (place in the model's order, name, kind) that ranks found, the one nearest to the loss, on the lowest rank."""
    best = max(((_depth(name), place, name, kind) for place, name, kind in own), default=None)
    by_rank: list[tuple[float, int, str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, best)
    found = [(key[0], -rank, key) for rank, key in enumerate(by_rank) if key is not None]
    if not found:
        return None
    _, negative_rank, (_, _, name, kind) = max(found)
    return Found(name, -negative_rank, kind)


def _depth(name: str) -> float:
    """How far along the forward pass a parameter stands: the embedding first, the blocks by number, the rest last."""
    if name.startswith("layers."):
        return float(name.split(".")[1])
    return -1.0 if name.startswith("embedding.") else float("inf")
