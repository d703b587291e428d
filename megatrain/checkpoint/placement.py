"""Where the parameters of this rank lie in the whole tensors, and which of them are its to save."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import nn

from megatrain.engine.engine import Engine
from megatrain.parallel import marks
from megatrain.parallel.marks import Split


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


def placement_of(engine: Engine, parameter: nn.Parameter) -> Placement:
    """Placement of ``parameter`` on this rank."""
    local = engine.shapes[parameter]
    splits = {"tp": Split.over(engine.mesh.tp_group), "ep": Split.over(engine.mesh.ep_group)}
    return Placement(tuple(local), *marks.place(parameter, local, splits))


def is_saved_here(engine: Engine, parameter: nn.Parameter) -> bool:
    """Whether this rank and those that share ``parameter`` save it: of several copies only one is kept."""
    tensor_copy = marks.partition_dim(parameter) is None and engine.mesh.coordinate("tp") > 0
    return not tensor_copy and not marks.marks_of(parameter).tied_copy


def sharing_ranks(engine: Engine) -> list[tuple[list[int], list[str]]]:
    """Global ranks, and the names of the parameters of which all hold the same part, whole or in ZeRO's partitions.

    Experts that are spread over ranks have other ones than the dense weights.
    """
    spread = {name: "ep" in marks.split_dims(parameter) for name, parameter in engine.parameters}
    groups = (engine.mesh.data_group, False), (engine.mesh.edp_group, True)
    return [
        (dist.get_process_group_ranks(group), [name for name, is_spread in spread.items() if is_spread == of_experts])
        for group, of_experts in groups
    ]
