"""The whole training state in layout-free form: FP32 weights and moments under canonical names.

DeepSpeed keeps them in flat partitions, spread over the ranks of a data-parallel group. A ``Fragment`` is what this
rank holds of one parameter: a run of elements of the flattened tensor-parallel part. No call here communicates but
``finish_import`` and ``export_state``.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from megatrain.engine.engine import Engine
from megatrain.engine.zero.fragments import Fragment, _link_moments, _make_moments, _moments_exist, _range
from megatrain.engine.zero.import_once import import_deepspeed
from megatrain.spec.kinds import FACTORS, WEIGHT


def kinds_of(engine: Engine, parameter: nn.Parameter) -> tuple[str, ...]:
    """Those of ``KINDS`` that this rank's optimizer keeps of a parameter."""
    return (WEIGHT, *engine.moments[parameter])


def factors(engine: Engine) -> dict[tuple[str, str], Tensor]:
    """By kind (``FACTORS``) and canonical name, the live state; none but Adafactor's."""
    own: dict[str, tuple[Tensor, Tensor]] = getattr(engine.base_optimizer, "factors", {})
    return {(kind, name): values for name, pair in own.items() for kind, values in zip(FACTORS, pair, strict=True)}


def local_fragments(engine: Engine) -> list[Fragment]:
    """What this rank holds of its parameters, in their order; those that lie on other ranks altogether are left out."""
    if _moments_exist(engine.base_optimizer):
        _link_moments(engine)
    ranges = ((name, parameter, *_range(engine, parameter)) for name, parameter in engine.parameters)
    return [Fragment(*fields) for fields in ranges if fields[-1] > 0]


def prepare_import(engine: Engine) -> None:
    """Makes the moments where no step has made them yet."""
    if not _moments_exist(engine.base_optimizer):
        _make_moments(engine)


def finish_import(engine: Engine) -> None:
    """Carries the FP32 weights over to those of the step. Collective."""
    optimizer = engine.optimizer
    if engine.config.parallel.zero_stage < 3:
        optimizer.update_lp_params()
        return
    # an evaluation may have left weights whole, which would go on to be used as they were
    optimizer.parameter_offload.partition_all_parameters()
    if persistent := optimizer.persistent_parameters:  # small weights that ZeRO 3 keeps whole
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)


def export_state(engine: Engine) -> Iterator[tuple[str, str, Tensor]]:
    """(kind, canonical name, FP32 tensor on the CPU) of every parameter of this rank, put together from all fragments.

    For tests and small models. Collective over the ranks that share ZeRO's partitions: all iterate to the end.
    """
    utils = import_deepspeed().utils
    made = _moments_exist(engine.base_optimizer)  # before the first step there are none
    if made:
        _link_moments(engine)
    for name, parameter in engine.parameters:
        weight = utils.safe_get_full_fp32_param(parameter).detach().float().cpu()
        yield WEIGHT, name, weight
        for kind in engine.moments[parameter]:
            moment = utils.safe_get_full_optimizer_state(parameter, kind) if made else torch.zeros_like(weight)
            yield kind, name, moment.detach().float().cpu()


def optimizer_step_count(engine: Engine) -> int:
    """Updates that AdamW has made (its bias correction); skipped steps do not count."""
    return max((int(state["step"]) for state in engine.base_optimizer.state.values() if "step" in state), default=0)


def set_optimizer_step_count(engine: Engine, count: int) -> None:
    """Sets AdamW's update count; ``prepare_import`` must have run before."""
    for state in engine.base_optimizer.state.values():
        state["step"] = torch.tensor(float(count))
