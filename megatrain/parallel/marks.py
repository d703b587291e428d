"""How parameters say which axes split them: the marks, and what follows from them for a tensor's place in the whole."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

Shape = tuple[int, ...]


class Split(NamedTuple):
    """This rank's place among the ranks that an axis splits tensors over."""

    rank: int = 0
    size: int = 1

    @classmethod
    def over(cls, group: dist.ProcessGroup | None) -> "Split":
        return cls() if group is None else cls(dist.get_rank(group), dist.get_world_size(group))


def partition_dim(parameter: Tensor) -> int | None:
    """Dim along which a parameter is split over the tensor axis; None: each rank holds it whole."""
    return getattr(parameter, "partition_dim", None) if getattr(parameter, "tensor_model_parallel", False) else None


def split_dims(parameter: Tensor) -> dict[str, int]:
    """Axes over which a parameter is split, and the dim that each splits."""
    found = {"ep": 0} if getattr(parameter, "expert_parallel", False) else {}
    dim = partition_dim(parameter)
    return found if dim is None else {**found, "tp": dim}


def place(parameter: Tensor, local_shape: torch.Size, splits: Mapping[str, Split]) -> tuple[Shape, Shape]:
    """Offset of this rank's part in the whole tensor, and the shape of the whole."""
    offset, shape = [0] * len(local_shape), list(local_shape)
    for axis, dim in split_dims(parameter).items():
        offset[dim] = local_shape[dim] * splits[axis].rank
        shape[dim] = local_shape[dim] * splits[axis].size
    return tuple(offset), tuple(shape)


def is_spread(parameter: nn.Parameter) -> bool:
    """Whether other ranks hold other experts in the place of this parameter."""
    return "ep" in split_dims(parameter)
