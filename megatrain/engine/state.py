"""The whole training state in layout-free form: FP32 weights and both moments under canonical names.

DeepSpeed keeps them in flat partitions; here they go in and out one tensor at a time, in the shape
that this tensor-parallel rank holds.
"""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatrain.engine.engine import Engine
from megatrain.engine.start import import_deepspeed

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHT, *MOMENTS)


def export_state(engine: Engine) -> Iterator[tuple[str, str, Tensor]]:
    """(kind, canonical name, FP32 tensor on the CPU) of every parameter of this rank.

    Collective over the ranks that share ZeRO's partitions: all of them iterate to the end.
    """
    utils = import_deepspeed().utils
    made = _moments_exist(engine)  # before the first step there are none
    if made:
        _link_moments(engine)
    for name, parameter in engine.parameters:
        weight = utils.safe_get_full_fp32_param(parameter).detach().float().cpu()
        yield WEIGHT, name, weight
        for kind in MOMENTS:
            moment = utils.safe_get_full_optimizer_state(parameter, kind) if made else torch.zeros_like(weight)
            yield kind, name, moment.detach().float().cpu()


def import_state(engine: Engine, read: Callable[[str, str, nn.Parameter], Tensor]) -> None:
    """Sets every weight and moment from ``read(kind, name, parameter)``, which returns this rank's part."""
    if not _moments_exist(engine):
        _make_moments(engine)
    for name, parameter in engine.parameters:
        for kind in KINDS:
            value = read(kind, name, parameter).to(engine.mesh.device)
            _set(engine, parameter, kind, value)
            if kind == WEIGHT and engine.config.parallel.zero_stage == 3:
                _update_compute_weight(engine, parameter, value)
    if engine.config.parallel.zero_stage < 3:
        engine.optimizer.update_lp_params()


def optimizer_step_count(engine: Engine) -> int:
    """Updates that AdamW has made (its bias correction); skipped steps do not count."""
    return max((int(state["step"]) for state in engine.base_optimizer.state.values() if "step" in state), default=0)


def set_optimizer_step_count(engine: Engine, count: int) -> None:
    """Sets AdamW's update count; ``import_state`` must have run before."""
    for state in engine.base_optimizer.state.values():
        state["step"] = torch.tensor(float(count))


def _moments_exist(engine: Engine) -> bool:
    return any("exp_avg" in state for state in engine.base_optimizer.state.values())


def _make_moments(engine: Engine) -> None:
    """Creates the moments that AdamW would create in its first step, in the flat partitions."""
    optimizer, base = engine.optimizer, engine.base_optimizer
    sharded_weights = engine.config.parallel.zero_stage == 3
    flats = (
        optimizer.fp32_partitioned_groups_flat
        if sharded_weights
        else [parameter for group in base.param_groups for parameter in group["params"]]
    )
    for flat in flats:
        base.state[flat] = {
            "step": torch.tensor(0.0),
            **{kind: torch.zeros_like(flat, requires_grad=False) for kind in MOMENTS},
        }
    _link_moments(engine)


def _link_moments(engine: Engine) -> None:
    """Lets DeepSpeed find a parameter's part of the flat moments: it looked before there were any."""
    if engine.config.parallel.zero_stage < 3:
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def _set(engine: Engine, parameter: nn.Parameter, kind: str, value: Tensor) -> None:
    utils = import_deepspeed().utils
    if engine.config.parallel.zero_stage == 3:
        # the setter of the whole tensor reads past its end where it does not divide
        size, rank = parameter.ds_tensor.numel(), dist.get_rank(engine.mesh.data_group)  # type: ignore[attr-defined]
        padded = torch.nn.functional.pad(value.flatten(), (0, size * engine.mesh.topology.data_size - value.numel()))
        part = padded.narrow(0, size * rank, size)
        if kind == WEIGHT:
            utils.safe_set_local_fp32_param(parameter, part)
        else:
            utils.safe_set_local_optimizer_state(parameter, part, kind)
    elif kind == WEIGHT:
        utils.safe_set_full_fp32_param(parameter, value)
    else:
        utils.safe_set_full_optimizer_state(parameter, value, kind)


def _update_compute_weight(engine: Engine, parameter: nn.Parameter, value: Tensor) -> None:
    """ZeRO 3 keeps the weight of the step apart from the FP32 one, so it is set as well."""
    with import_deepspeed().zero.GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(value)
