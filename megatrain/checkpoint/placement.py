"""Where the parameters of this rank lie in the whole tensors, and which of them are its to save."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import nn

from megatrain.engine.engine import Engine
from megatrain.parallel.layers import partition_dim, whole_shape


@dataclass(frozen=True)
class Placement:
    """A tensor-parallel part: its ``shape``, where it begins in the whole tensor, and that one's shape."""

    shape: tuple[int, ...]
    offset: tuple[int, ...]
    full_shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Extent of the first dim; chunks are cut along it."""
        return self.shape[0] if self.shape else 1

    @property
    def splits_rows(self) -> bool:
        """Whether other ranks hold further rows of the tensor."""
        return self.shape[:1] != self.full_shape[:1]


def place(engine: Engine, parameter: nn.Parameter) -> Placement:
    """Placement of ``parameter`` on this rank."""
    local = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO 3 empties the parameter itself
    dim, tp_rank = partition_dim(parameter), engine.mesh.coordinate("tp")
    offset = tuple(size * tp_rank if i == dim else 0 for i, size in enumerate(local))
    return Placement(tuple(local), offset, whole_shape(parameter, local, engine.mesh.topology.tp))


def saves(engine: Engine, parameter: nn.Parameter) -> bool:
    """Whether this rank and those of its data-parallel group save ``parameter``: of several copies only one is kept."""
    tensor_copy = partition_dim(parameter) is None and engine.mesh.coordinate("tp") > 0
    return not tensor_copy and not getattr(parameter, "ds_pipe_replicated", False)


def sharing_ranks(engine: Engine) -> list[int]:
    """Global ranks that hold the same parameters as this one, whole or in ZeRO's partitions."""
    return dist.get_process_group_ranks(engine.mesh.data_group)
