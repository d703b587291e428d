"""What a rank holds of one parameter, and how it is read and written."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatrain.engine.zero.import_once import import_deepspeed
from megatrain.spec.kinds import WEIGHT


@dataclass(frozen=True)
class Fragment(ABC):
    """Elements ``[start, start + size)`` of a parameter's flattened part on this tensor-parallel rank."""

    name: str
    parameter: nn.Parameter
    start: int
    size: int

    @property
    def shape(self) -> torch.Size:
        """Of the whole part that the fragment belongs to."""
        return self.parameter.shape

    def values(self, kind: str) -> Tensor:
        """[size] FP32, a view of the live state where it lies in memory; zeros for a moment that isn't made yet."""
        state = self._state(kind)
        return torch.zeros(self.size) if state is None else state.detach()[: self.size]

    def memory(self, kind: str) -> Tensor | None:
        """[size] FP32 in host memory that may be written instead of a call to ``set``, if there is such."""
        state = self._state(kind)
        return state.detach() if state is not None and state.device.type == "cpu" else None

    def set(self, kind: str, values: Tensor) -> None:
        """Overwrites the state; moments must have been made (``prepare_import``); others are dropped."""
        state = self._state(kind)
        if state is not None:
            state.detach().copy_(values)

    @abstractmethod
    def _state(self, kind: str) -> Tensor | None:
        """The flat values of ``kind``, padding included; None for a moment that isn't made yet, or never is."""


@dataclass(frozen=True)
class OwnFragment(Fragment):
    """Elements from number ``at`` on of a tensor that torch's optimizer updates: the ``held`` weights, or a shard of
    many; ``moments``: the optimizer's state of it."""

    held: Tensor
    moments: dict[str, Tensor]
    at: int = 0

    def _state(self, kind: str) -> Tensor | None:
        state = self.held if kind == WEIGHT else self.moments.get(kind)
        return None if state is None else state.view(-1)[self.at : self.at + self.size]


@dataclass(frozen=True)
class PartitionFragment(Fragment):
    """A run of elements in the flat partitions of DeepSpeed's optimizers for ZeRO 1 and 2."""

    def _state(self, kind: str) -> Tensor | None:
        mapping = self.parameter._hp_mapping  # type: ignore[attr-defined]
        if kind != WEIGHT and kind not in (mapping.optim_fragment or ()):
            return None
        return mapping.get_hp_fragment(None if kind == WEIGHT else kind)


@dataclass(frozen=True)
class Stage3Fragment(Fragment):
    """What ZeRO 3 left of a parameter on this rank; it may lie on a disk."""

    @property
    def shape(self) -> torch.Size:
        return self.parameter.ds_shape  # type: ignore[attr-defined]  # the parameter itself is empty

    def memory(self, kind: str) -> Tensor | None:
        return None

    def set(self, kind: str, values: Tensor) -> None:
        if not self._has(kind):
            return
        held = self.parameter.ds_tensor  # type: ignore[attr-defined]
        padded = torch.nn.functional.pad(values.to(held.device), (0, held.numel() - self.size))
        utils = import_deepspeed().utils  # also swaps back what lies on disk
        if kind == WEIGHT:
            utils.safe_set_local_fp32_param(self.parameter, padded)
            held.data.copy_(padded)  # the weight of the step
        else:
            utils.safe_set_local_optimizer_state(self.parameter, padded, kind)

    def _state(self, kind: str) -> Tensor | None:
        utils = import_deepspeed().utils
        if kind == WEIGHT:
            return utils.safe_get_local_fp32_param(self.parameter)
        return utils.safe_get_local_optimizer_state(self.parameter, kind) if self._has(kind) else None

    def _has(self, kind: str) -> bool:
        states = self.parameter._z3_optimizer.optimizer.state.values()  # type: ignore[attr-defined]
        return kind == WEIGHT or any(kind in state for state in states)
