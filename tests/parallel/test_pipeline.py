"""What is done to torch's schedules before they run, and the groups of a pipeline."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megatrain.config.schema import ParallelConfig
from megatrain.parallel.mesh import build_mesh, topology_of
from megatrain.parallel.pipeline import Pipeline
from tests.pool import Pool


def prepared_actions(num_micro_batches: int) -> list[str]:
    """This rank's actions and messages under DualPipeV, as torch writes them: 3F5, 3SEND_F5."""
    parallel = ParallelConfig.model_validate({"pp": 2, "dp": 1, "pp_schedule": "dualpipev", "stages_per_rank": 2})
    mesh = build_mesh(topology_of(parallel), torch.device("cpu"))
    pipeline: Any = Pipeline([nn.Linear(1, 1), nn.Linear(1, 1)], parallel, 1, mesh, lambda: None)
    schedule = pipeline._build(num_micro_batches)
    return [str(action) for action in schedule.pipeline_order_with_comms[schedule.rank]]


def test_dualpipev_sends_what_it_computed_before_it_computes_on(pool: Pool) -> None:
    for actions in pool.run(prepared_actions, 2, 6):
        sends = [i for i, action in enumerate(actions) if "SEND" in action]
        assert len(sends) == 12  # one forward and one backward over a border for each micro-batch
        for i in sends:
            before = next(action for action in reversed(actions[:i]) if "RECV" not in action)
            stage, kind, micro_batch = actions[i].partition("SEND_")[0], actions[i][-2], actions[i][-1]
            assert before in (f"{stage}{kind}{micro_batch}", f"{stage}I{micro_batch}"), (actions[i], before)


def meshes_in_turn() -> list[int]:
    """Sizes of the groups of tied embeddings of two meshes, made one after the other in one world."""
    parallel = ParallelConfig.model_validate({"pp": 4, "dp": 1})
    meshes = [build_mesh(topology_of(parallel), torch.device("cpu")) for _ in range(2)]
    return [dist.get_world_size(mesh.tied_group) for mesh in meshes]


def test_a_world_may_build_a_mesh_again(pool: Pool) -> None:
    assert pool.run(meshes_in_turn, 4) == [[2, 2], [1, 1], [1, 1], [2, 2]]
