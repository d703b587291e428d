"""The process groups of this rank."""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatrain.config.schema import ParallelConfig
from megatrain.parallel.topology import Topology


@dataclass(frozen=True)
class Mesh:
    """This rank's place and the groups that it belongs to.

    ``data_group`` holds the ranks with the same dense weights (context x data); it is shared out into
    ``ep_group``, over which the experts are spread, and ``edp_group``, the ranks with the same experts.
    ``model_group`` holds the ranks that together hold one copy of the dense weights (tensor x pipeline), and
    ``expert_model_group`` those that hold one of all weights (tensor x expert x pipeline);
    ``tied_group`` the first and last rank of the pipeline, which share tied embeddings
    (on the ranks between them: each alone); ``self_group`` this rank alone.
    """

    topology: Topology
    rank: int
    device: torch.device
    tp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    ep_group: dist.ProcessGroup
    edp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    model_group: dist.ProcessGroup
    expert_model_group: dist.ProcessGroup
    tied_group: dist.ProcessGroup
    self_group: dist.ProcessGroup

    def coordinate(self, axis: str) -> int:
        return self.topology.coordinate(self.rank, axis)

    def pipeline_rank(self, pp_rank: int) -> int:
        """Global rank of a rank of this rank's pipeline."""
        return dist.get_process_group_ranks(self.pp_group)[pp_rank]


def topology_of(parallel: ParallelConfig) -> Topology:
    """Topology of a resolved config (``dp`` is set)."""
    assert parallel.dp is not None, "resolve the config first"
    return Topology(tp=parallel.tp, cp=parallel.cp, dp=parallel.dp, pp=parallel.pp, ep=parallel.ep)


def build_mesh(topology: Topology, device: torch.device) -> Mesh:
    """Makes this rank's groups, which wait for nobody else's. Every rank of the world calls it.

    Raises:
        ValueError: the world's size is not the topology's.
    """
    world_size, rank = dist.get_world_size(), dist.get_rank()
    if world_size != topology.world_size:
        raise ValueError(f"{topology} needs {topology.world_size} ranks, but {world_size} were started")
    # torch names a group after its ranks and the number of groups that each of them has, so all make as many
    ends = [part for r in topology.groups(["pp"]) for part in (sorted({r[0], r[-1]}), *([one] for one in r[1:-1]))]
    return Mesh(
        topology=topology,
        rank=rank,
        device=device,
        tp_group=_own_group(topology.groups(["tp"]), rank),
        cp_group=_own_group(topology.groups(["cp"]), rank),
        data_group=_own_group(topology.groups(["cp", "dp"]), rank),
        ep_group=_own_group(topology.groups(["ep"]), rank),
        edp_group=_own_group(topology.groups(["edp"]), rank),
        pp_group=_own_group(topology.groups(["pp"]), rank),
        model_group=_own_group(topology.groups(["tp", "pp"]), rank),
        expert_model_group=_own_group(topology.groups(["tp", "ep", "pp"]), rank),
        tied_group=_own_group(ends, rank),
        self_group=_own_group(topology.groups([]), rank),
    )


def _own_group(all_ranks: list[list[int]], rank: int) -> dist.ProcessGroup:
    own = next(ranks for ranks in all_ranks if rank in ranks)
    return dist.new_group(own, use_local_synchronization=True)  # type: ignore[return-value]
