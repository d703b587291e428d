"""What a parameter says of itself: which axes split it, which of several copies counts; and what follows from it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Shape = tuple[int, ...]


class Split(NamedTuple):
    """This rank's place among the ranks that an axis splits tensors over."""

    rank: int = 0
    size: int = 1

    @classmethod
    def over(cls, group: dist.ProcessGroup | None) -> "Split":
        return cls() if group is None else cls(dist.get_rank(group), dist.get_world_size(group))


@dataclass(frozen=True)
class Marks:
    """How a parameter of this rank stands to those of other ranks.

    ``tensor_dim``: the dim that is split over the tensor axis; None: each tensor rank holds it whole. ``spread``: it is
    of experts, and other ranks of the expert axis hold other ones in its place. ``tied_copy``: another stage holds the
    same weight, and saves it. ``counted_elsewhere``: a copy on another rank counts in the gradient norm.
    ``expert_group``: DeepSpeed's name of the ranks over which it reduces spread experts, where it does.
    """

    tensor_dim: int | None = None
    spread: bool = False
    tied_copy: bool = False
    counted_elsewhere: bool = False
    expert_group: str | None = None


def marks_of(parameter: Tensor) -> Marks:
    """Marks of ``parameter``; of one that nobody marked those of a whole, only copy."""
    return getattr(parameter, "marks", Marks())


def mark(parameter: Tensor, **changes: Any) -> None:
    """Sets fields of a parameter's marks, also as megatron-core and DeepSpeed read them."""
    marks = replace(marks_of(parameter), **changes)
    told = {"marks": marks, "ds_pipe_replicated": marks.counted_elsewhere}
    if marks.tensor_dim is not None:
        told |= {"tensor_model_parallel": True, "partition_dim": marks.tensor_dim, "partition_stride": 1}
    if marks.expert_group is not None:
        told |= {"allreduce": False, "group_name": marks.expert_group}
    for name, value in told.items():
        setattr(parameter, name, value)


def partition_dim(parameter: Tensor) -> int | None:
    """Dim along which a parameter is split over the tensor axis; None: each rank holds it whole."""
    return marks_of(parameter).tensor_dim


def split_dims(parameter: Tensor) -> dict[str, int]:
    """Axes over which a parameter is split, and the dim that each splits."""
    marks = marks_of(parameter)
    found = {"ep": 0} if marks.spread else {}
    return found if marks.tensor_dim is None else {**found, "tp": marks.tensor_dim}


def place(parameter: Tensor, local_shape: torch.Size, splits: Mapping[str, Split]) -> tuple[Shape, Shape]:
    """Offset of this rank's part in the whole tensor, and the shape of the whole."""
    offset, shape = [0] * len(local_shape), list(local_shape)
    for axis, dim in split_dims(parameter).items():
        offset[dim] = local_shape[dim] * splits[axis].rank
        shape[dim] = local_shape[dim] * splits[axis].size
    return tuple(offset), tuple(shape)


def is_spread(parameter: Tensor) -> bool:
    """Whether other ranks hold other experts in the place of this parameter."""
    return marks_of(parameter).spread
