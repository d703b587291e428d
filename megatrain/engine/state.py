"""The whole training state in layout-free form: FP32 weights and moments under canonical names.

They may lie in flat partitions, spread over the ranks of a data-parallel group. A ``Fragment`` is what this rank holds
of one parameter: a run of elements of the flattened tensor-parallel part. No call here communicates but
``finish_import`` and ``export_state``.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from megatrain.engine.engine import Engine
from megatrain.engine.zero.fragments import Fragment
from megatrain.spec.kinds import FACTORS, WEIGHT


def kinds_of(engine: Engine, parameter: nn.Parameter) -> tuple[str, ...]:
    """Those of ``KINDS`` that this rank's optimizer keeps of a parameter."""
    return (WEIGHT, *engine.moments[parameter])


def factors(engine: Engine) -> dict[tuple[str, str], Tensor]:
    """By kind (``FACTORS``) and canonical name, the live state; none but Adafactor's."""
    own: dict[str, tuple[Tensor, Tensor]] = getattr(engine.runtime.base_optimizer, "factors", {})
    return {(kind, name): values for name, pair in own.items() for kind, values in zip(FACTORS, pair, strict=True)}


def local_fragments(engine: Engine) -> list[Fragment]:
    """What this rank holds of its parameters, in their order; those that lie on other ranks altogether are left out."""
    engine.runtime.link_moments()
    found = (engine.runtime.fragment(name, parameter) for name, parameter in engine.parameters)
    return [fragment for fragment in found if fragment is not None]


def prepare_import(engine: Engine) -> None:
    """Makes the moments where no step has made them yet."""
    if not engine.runtime.moments_exist():
        engine.runtime.make_moments()


def finish_import(engine: Engine) -> None:
    """Carries the FP32 weights over to those of the step. Collective."""
    engine.runtime.finish_import()


def export_state(engine: Engine) -> Iterator[tuple[str, str, Tensor]]:
    """(kind, canonical name, FP32 tensor on the CPU) of every parameter of this rank, put together from all fragments.

    For tests and small models. Collective over the ranks that share ZeRO's partitions: all iterate to the end.
    """
    runtime = engine.runtime
    made = runtime.moments_exist()  # before the first step there are none
    runtime.link_moments()
    for name, parameter in engine.parameters:
        weight = runtime.whole(parameter, WEIGHT).detach().float().cpu()
        yield WEIGHT, name, weight
        for kind in engine.moments[parameter]:
            moment = runtime.whole(parameter, kind) if made else torch.zeros_like(weight)
            yield kind, name, moment.detach().float().cpu()


def optimizer_step_count(engine: Engine) -> int:
    """Updates that AdamW has made (its bias correction); skipped steps do not count."""
    states = engine.runtime.base_optimizer.state.values()
    return max((int(state["step"]) for state in states if "step" in state), default=0)


def set_optimizer_step_count(engine: Engine, count: int) -> None:
    """Sets AdamW's update count; ``prepare_import`` must have run before."""
    for state in engine.runtime.base_optimizer.state.values():
        counter = state.get("step", torch.tensor(0.0))  # Adafactor makes a matrix' own in its first step
        state["step"] = torch.full_like(counter, float(count))
