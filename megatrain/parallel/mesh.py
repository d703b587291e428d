"""The process groups of this rank."""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from megatrain.config.schema import ResolvedParallel
from megatrain.parallel.topology import Topology

_Groups = dict[tuple[str, tuple[int, ...]], dist.ProcessGroup]
_groups: WeakKeyDictionary[dist.ProcessGroup, _Groups] = WeakKeyDictionary()
"""The groups of each world that lives, by purpose and ranks."""


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


def topology_of(parallel: ResolvedParallel) -> Topology:
    """Topology of a layout."""
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

    def group(purpose: str, all_ranks: list[list[int]]) -> dist.ProcessGroup:
        own = next(ranks for ranks in all_ranks if rank in ranks)
        return group_of(purpose, own, use_local_synchronization=True)

    return Mesh(
        topology=topology,
        rank=rank,
        device=device,
        tp_group=group("tp", topology.groups(["tp"])),
        cp_group=group("cp", topology.groups(["cp"])),
        data_group=group("data", topology.groups(["cp", "dp"])),
        ep_group=group("ep", topology.groups(["ep"])),
        edp_group=group("edp", topology.groups(["edp"])),
        pp_group=group("pp", topology.groups(["pp"])),
        model_group=group("model", topology.groups(["tp", "pp"])),
        expert_model_group=group("expert_model", topology.groups(["tp", "ep", "pp"])),
        tied_group=group("tied", ends),
        self_group=group("self", topology.groups([])),
    )


def group_of(purpose: str, ranks: list[int], **options: Any) -> dist.ProcessGroup:
    """The world's group of ``ranks`` for ``purpose``: made when first asked for, and the same one after that.

    A group holds three threads (gloo) or memory of the GPU (NCCL) as long as the world lives, so a process that
    builds one engine after another must not make new ones for each. They can't end with their engine: torch would
    give the next ones their names, and these would find the addresses of the old ones in the store.
    """
    world = dist.group.WORLD
    assert world is not None, "start the world first"
    groups = _groups.setdefault(world, {})
    key = purpose, tuple(ranks)
    if key not in groups:
        groups[key] = dist.new_group(ranks, **options)  # type: ignore[assignment]
    return groups[key]
