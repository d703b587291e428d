"""What DeepSpeed must know of experts that are spread over ranks: who holds copies of which.

It finds an expert by marks on the parameter, the groups by a module of a class of its own, and wants experts in
parameter groups of their own. Then ZeRO 1 and 2 shard and sum them over the ranks with the same experts.
"""

from collections.abc import Iterable

import torch.distributed as dist
from torch import nn

from megatrain.engine.zero.import_once import import_deepspeed
from megatrain.parallel.marks import is_spread, mark
from megatrain.parallel.mesh import Mesh


def mark_experts(model: nn.Module, mesh: Mesh) -> None:
    """Sets DeepSpeed's marks on the spread experts of ``model``, if it has any, and adds the module it looks for."""
    experts = [parameter for parameter in model.parameters() if is_spread(parameter)]
    name = f"ep_size_{mesh.topology.ep}"
    for parameter in experts:
        mark(parameter, expert_group=name)
    if experts:
        model.add_module("expert_groups", _expert_groups(name, mesh))


def mark_dense_copies(parameters: Iterable[nn.Parameter], mesh: Mesh) -> None:
    """Lets dense weights count once in a gradient norm that is summed over the expert axis (ZeRO 0)."""
    if mesh.coordinate("ep") > 0:
        for parameter in parameters:
            if not is_spread(parameter):
                mark(parameter, counted_elsewhere=True)


def _expert_groups(name: str, mesh: Mesh) -> nn.Module:
    """A module without weights of the class that DeepSpeed looks for; it gives DeepSpeed our groups."""
    import_deepspeed()
    from deepspeed.moe.layer import MoE
    from deepspeed.utils import groups

    class ExpertGroups(MoE):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = mesh.topology.ep

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            groups._EXPERT_PARALLEL_GROUP[name] = mesh.ep_group
            groups._EXPERT_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(mesh.ep_group)
            groups._EXPERT_DATA_PARALLEL_GROUP[name] = mesh.edp_group
            groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(mesh.edp_group)

    return ExpertGroups()
