"""What a rank holds of one parameter in DeepSpeed's flat partitions, and how it is read and written."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatrain.engine.engine import Engine
from megatrain.engine.zero.import_once import import_deepspeed
from megatrain.spec.kinds import MOMENTS, WEIGHT


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
