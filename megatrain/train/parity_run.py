"""Runs two layouts one after the other, each in processes of its own on this machine, and compares them."""

import multiprocessing
import os
import socket
from dataclasses import dataclass

from megatrain.config.schema import RunConfig
from megatrain.engine.start import start_distributed
from megatrain.optim.schedule import learning_rate
from megatrain.parallel.mesh import topology_of
from megatrain.train.parity import RankCapture, capture_step
from megatrain.train.parity_compare import BANDS, Divergence, compare


@dataclass(frozen=True)
class Parity:
    """What came out: ``num_tensors`` were compared, on ``num_ranks`` ranks of the layout in question."""

    differences: list[Divergence]
    num_tensors: int
    num_ranks: int
    loss: float


def compare_layouts(ours: RunConfig, reference: RunConfig) -> Parity:
    """One step of both resolved configs."""
    ranks, reference_ranks = run_layout(ours), run_layout(reference)
    lr = learning_rate(1, ours.train.steps, ours.schedule, ours.optimizer)
    differences = compare(ranks, reference_ranks, BANDS[ours.precision.dtype], lr)
    num_tensors = len({key for rank in reference_ranks for key in rank.parts})
    return Parity(differences, num_tensors, len(ranks), ranks[0].scalars["loss"])


def run_layout(config: RunConfig) -> list[RankCapture]:
    """What each rank captured."""
    world_size = topology_of(config.parallel).world_size
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatrain.train.preload"])
    with context.Pool(world_size) as pool:  # all wait for each other: one task each
        tasks = [(config, rank, world_size, port) for rank in range(world_size)]
        return pool.starmap(_run_rank, tasks, chunksize=1)


def _run_rank(config: RunConfig, rank: int, world_size: int, port: int) -> RankCapture:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    return capture_step(config, start_distributed())
