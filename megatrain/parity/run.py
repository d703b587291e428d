"""Runs two layouts one after the other, each in processes of its own on this machine, and compares them."""

import multiprocessing
import os
import socket
from dataclasses import dataclass

from megatrain.config.schema import ResolvedRun
from megatrain.engine.start import start_distributed
from megatrain.parallel.mesh import topology_of
from megatrain.parity.bands import Bands
from megatrain.parity.capture import RankCapture, capture_steps
from megatrain.parity.compare import Divergence, compare

DRAWS = 4
"""Disturbed runs of the reference."""


@dataclass(frozen=True)
class Parity:
    """What came out: ``num_tensors`` were compared, on ``num_ranks`` ranks of the layout in question.

    ``loss``: of its first step.
    """

    differences: list[Divergence]
    num_tensors: int
    num_ranks: int
    loss: float


def compare_layouts(ours: ResolvedRun, reference: ResolvedRun) -> Parity:
    """The first steps of both resolved configs."""
    ranks, bands = run_layout(ours)[0], Bands(run_layout(reference, DRAWS))
    return Parity(compare(ranks, bands), bands.num_tensors, len(ranks), ranks[0].scalars[1, "loss"])


def run_layout(config: ResolvedRun, draws: int = 0) -> list[list[RankCapture]]:
    """What each rank captured, undisturbed and then in each of some draws of noise."""
    world_size = topology_of(config.parallel).world_size
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatrain.parity.preload"])
    with context.Pool(world_size) as pool:  # all wait for each other: one task each
        tasks = [(config, draws, rank, world_size, port) for rank in range(world_size)]
        return list(map(list, zip(*pool.starmap(_run_rank, tasks, chunksize=1), strict=True)))


def _run_rank(config: ResolvedRun, draws: int, rank: int, world_size: int, port: int) -> list[RankCapture]:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    device = start_distributed()
    return [capture_steps(config, device, draw=draw) for draw in range(1 + draws)]
