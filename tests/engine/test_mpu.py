"""What DeepSpeed is told about the mesh, rank by rank: pure answers, in worlds whose other ranks are only named."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatrain.engine.zero.mpu import MeshForDeepSpeed
from megatrain.parallel.mesh import build_mesh
from megatrain.parallel.topology import Topology

Ranks = list[int]


@contextlib.contextmanager
def world(rank: int, size: int) -> Iterator[None]:
    """One rank of ``size``, the others made up."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def answers(topology: Topology, rank: int, sharded: bool) -> tuple[Ranks, Ranks, Ranks]:
    """The tensor, model and data ranks that this rank belongs to, as DeepSpeed hears it."""
    with world(rank, topology.world_size):
        told = MeshForDeepSpeed(build_mesh(topology, torch.device("cpu")), shards_data_parallel=sharded)
        found = []
        for kind in ("tensor_model", "model", "data"):
            group = getattr(told, f"get_{kind}_parallel_group")()
            ranks = dist.get_process_group_ranks(group)
            assert getattr(told, f"get_{kind}_parallel_world_size")() == len(ranks)
            assert ranks[getattr(told, f"get_{kind}_parallel_rank")()] == rank
            found.append(ranks)
        return found[0], found[1], found[2]


@pytest.mark.parametrize(
    ("rank", "tensor", "model", "data"),
    [
        (0, [0, 1], [0, 1, 4, 5], [0, 2]),
        (3, [2, 3], [2, 3, 6, 7], [1, 3]),
        (6, [6, 7], [2, 3, 6, 7], [4, 6]),
    ],
)
def test_tensor_and_pipeline_ranks_are_one_model(rank: int, tensor: Ranks, model: Ranks, data: Ranks) -> None:
    topology = Topology(tp=2, dp=2, pp=2)
    assert answers(topology, rank, sharded=True) == (tensor, model, data)
    assert answers(topology, rank, sharded=False) == (tensor, model, [rank]), "ZeRO 0 shares its states with nobody"


@pytest.mark.parametrize(("rank", "model", "data"), [(1, [0, 1], [1, 3, 5, 7]), (6, [6, 7], [0, 2, 4, 6])])
def test_context_ranks_are_data_ranks_and_experts_count_as_model_without_zero(
    rank: int, model: Ranks, data: Ranks
) -> None:
    topology = Topology(tp=2, cp=2, dp=2, ep=2)
    assert answers(topology, rank, sharded=True)[1:] == (model, data)
    with_experts = [0, 1, 2, 3] if rank < 4 else [4, 5, 6, 7]
    assert answers(topology, rank, sharded=False)[1:] == (with_experts, [rank])
