"""The whole training state in layout-free form: FP32 weights and moments under canonical names.

DeepSpeed keeps them in flat partitions, spread over the ranks of a data-parallel group. A ``Fragment`` is what this
rank holds of one parameter: a run of elements of the flattened tensor-parallel part. No call here communicates but
``finish_import`` and ``export_state``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatrain.engine.engine import Engine
from megatrain.engine.start import import_deepspeed
from megatrain.spec.kinds import FACTORS, MOMENTS, WEIGHT


@dataclass(frozen=True)
class Fragment:
    """Elements ``[start, start + size)`` of a parameter's flattened part on this tensor-parallel rank."""

    name: str
    parameter: nn.Parameter
    start: int
    size: int

    @property
    def shape(self) -> torch.Size:
        """Of the whole part that the fragment belongs to."""
        return _local_shape(self.parameter)

    def values(self, kind: str) -> Tensor:
        """[size] FP32, a view of the live state where it lies in memory; zeros for a moment that isn't made yet."""
        if not self._has(kind):
            return torch.zeros(self.size)
        return self._state(kind).detach()[: self.size]

    def memory(self, kind: str) -> Tensor | None:
        """[size] FP32 in host memory that may be written instead of a call to ``set``, if there is such."""
        state = None if _is_zero3(self.parameter) or not self._has(kind) else self._state(kind).detach()
        return state if state is not None and state.device.type == "cpu" else None

    def set(self, kind: str, values: Tensor) -> None:
        """Overwrites the state; moments must have been made (``prepare_import``); others are dropped."""
        if not self._has(kind):
            return
        state = self._state(kind).detach()
        if not _is_zero3(self.parameter):
            state.copy_(values)
            return
        padded = torch.nn.functional.pad(values.to(state.device), (0, state.numel() - self.size))
        utils = import_deepspeed().utils  # also swaps back what lies on disk
        if kind == WEIGHT:
            utils.safe_set_local_fp32_param(self.parameter, padded)
            self.parameter.ds_tensor.data.copy_(padded)  # type: ignore[attr-defined]  # the weight of the step
        else:
            utils.safe_set_local_optimizer_state(self.parameter, padded, kind)

    def _state(self, kind: str) -> Tensor:
        utils, parameter = import_deepspeed().utils, self.parameter
        if not _is_zero3(parameter):
            return parameter._hp_mapping.get_hp_fragment(None if kind == WEIGHT else kind)  # type: ignore[attr-defined]
        if kind == WEIGHT:
            return utils.safe_get_local_fp32_param(parameter)
        return utils.safe_get_local_optimizer_state(parameter, kind)

    def _has(self, kind: str) -> bool:
        return kind == WEIGHT or _has_moment(self.parameter, kind)


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


def _is_zero3(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


def _local_shape(parameter: nn.Parameter) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # ZeRO 3 empties the parameter itself


def _range(engine: Engine, parameter: nn.Parameter) -> tuple[int, int]:
    """Start and size of the fragment on this rank; the size is 0 where it has none."""
    if _is_zero3(parameter):
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        start = size * dist.get_rank(engine.mesh.data_group)
        return start, min(size, _local_shape(parameter).numel() - start)  # the last rank's is padded
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    return (0, 0) if mapping is None else (mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel)


def _has_moment(parameter: nn.Parameter, kind: str) -> bool:
    if _is_zero3(parameter):
        states = parameter._z3_optimizer.optimizer.state.values()  # type: ignore[attr-defined]
        return any(kind in state for state in states)
    return kind in (parameter._hp_mapping.optim_fragment or ())  # type: ignore[attr-defined]


def _moments_exist(optimizer: Any) -> bool:
    return any(kind in state for state in optimizer.state.values() for kind in MOMENTS)


def _make_moments(engine: Engine) -> None:
    """Creates the moments that the optimizer would create in its first step, in the flat partitions."""
    optimizer, base = engine.optimizer, engine.base_optimizer
    if engine.config.parallel.zero_stage == 3:  # all groups of such an optimizer have the same moments
        flats = [(flat, base.param_groups[0]) for flat in optimizer.fp32_partitioned_groups_flat]
    else:
        flats = [(flat, group) for group in base.param_groups for flat in group["params"]]
    for flat, group in flats:
        base.state[flat] = {
            "step": torch.tensor(0.0),
            **{kind: torch.zeros_like(flat, requires_grad=False) for kind in group["moments"]},
        }
    _link_moments(engine)


def _link_moments(engine: Engine) -> None:
    """Lets DeepSpeed find a parameter's part of the flat moments: it looked before there were any."""
    if engine.config.parallel.zero_stage < 3:
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
