"""Idle time of pipeline schedules, with stages that sleep known times, against theory.

    python -m benchmarks.bubble --pp 2 4 --factors 1 2 4 8

Each rank is a process; a stage sleeps for a forward, an input gradient and a weight gradient and computes next to
nothing, so what is lost is the schedule's own. Theory is the time of the same actions with messages that take none
(megatrain/plan/pipeline.py); printed is what the measured step takes beyond it, as a share.
"""

import argparse
import ctypes
import multiprocessing
import os
import socket
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatrain.config.pipeline_schedules import PIPELINE_SCHEDULES
from megatrain.config.schema import ResolvedParallel
from megatrain.config.stages import num_stages, own_stages
from megatrain.plan.pipeline import timeline

UNIT = 0.02  # seconds of each F, I and W, unless --unit says otherwise


class _Nap(torch.autograd.Function):
    """x, with a nap for its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        time.sleep(UNIT)
        return gradient


class SleepingStage(nn.Module):
    """A pipeline stage [B, 1] -> [B, 1] that takes UNIT for each kind of work; the last returns losses [B]."""

    def __init__(self, first: bool, last: bool):
        super().__init__()
        self.first, self.last = first, last
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        if self.first:
            x = x.float()
            x.requires_grad_(torch.is_grad_enabled())  # its input gradient takes as long as any other
        time.sleep(UNIT)
        x = _Nap.apply(x) + _Nap.apply(self.weight)  # apart, so that each gradient can be computed without the other
        return x.sum(1) if self.last else x


def bare_step(parallel: ResolvedParallel, rank: int, stages: list[nn.Module], batch: Tensor) -> Callable[[], object]:
    """A step of torch's own stages and schedule, without ours."""
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

    own, total = own_stages(parallel, rank), num_stages(parallel)
    wrapped = [PipelineStage(s, i, total, torch.device("cpu")) for s, i in zip(stages, own, strict=True)]
    kind: Any = get_schedule_class(PIPELINE_SCHEDULES[parallel.pp_schedule].torch_name)
    schedule = kind(
        wrapped if issubclass(kind, PipelineScheduleMulti) else wrapped[0], len(batch), lambda x, _: x.sum()
    )
    arguments, target = ([batch] if 0 in own else []), {"target": batch[:, 0]} if total - 1 in own else {}
    return lambda: schedule.step(*arguments, **target, return_outputs=False)


def step_seconds(parallel: ResolvedParallel, num_micro_batches: int, bare: bool, repeats: int) -> float:
    """Seconds of a step, from a barrier to the end of the last rank; the median of some."""
    from megatrain.parallel.mesh import build_mesh, topology_of
    from megatrain.parallel.pipeline import Pipeline
    from megatrain.parallel.step_input import StepInput

    mesh = build_mesh(topology_of(parallel), torch.device("cpu"))
    total = num_stages(parallel)
    stages: list[nn.Module] = [
        SleepingStage(stage == 0, stage == total - 1) for stage in own_stages(parallel, mesh.coordinate("pp"))
    ]
    ones = torch.ones(num_micro_batches, 1)
    if bare:
        step = bare_step(parallel, mesh.coordinate("pp"), stages, ones)
    else:
        pipeline = Pipeline(stages, parallel, 1, mesh, lambda: None)
        step = partial(pipeline.forward_backward, StepInput(ones, ones.long(), ones[:, 0].long(), None))
    unit, times = 1000 * UNIT, []
    set_unit(0)
    step()  # learns the shapes
    set_unit(unit)
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    spent = torch.tensor(statistics.median(times))
    dist.all_reduce(spent, op=dist.ReduceOp.MAX)
    return float(spent)


def run_rank(
    rank: int, pp: int, port: int, schedules: list[str], factors: list[int], bare: bool, unit: float, repeats: int
) -> dict[tuple[str, int], float]:
    """All measurements of one pipeline size, on one rank: seconds by (schedule, micro-batches)."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(pp), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    set_unit(unit)
    wake_in_time()
    dist.init_process_group("gloo")
    wanted = [(schedule, factor * pp) for schedule in schedules for factor in factors]
    wanted = [(name, count) for name, count in wanted if PIPELINE_SCHEDULES[name].takes_micro_batches(count, pp)]
    found = {key: step_seconds(layout(key[0], pp), key[1], bare, repeats) for key in wanted}
    dist.destroy_process_group()
    return found


def wake_in_time() -> None:
    """Lets this process's sleeps end when they should; Linux may add 50 us to each (prctl(2), PR_SET_TIMERSLACK)."""
    ctypes.CDLL(None).prctl(29, ctypes.c_ulong(1))


def set_unit(milliseconds: float) -> None:
    global UNIT
    UNIT = milliseconds / 1000


def layout(schedule: str, pp: int) -> ResolvedParallel:
    stages = PIPELINE_SCHEDULES[schedule].least_stages
    return ResolvedParallel.model_validate({"pp": pp, "dp": 1, "pp_schedule": schedule, "stages_per_rank": stages})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pp", nargs="+", type=int, default=[2, 4, 8], help="pipeline sizes")
    parser.add_argument("--factors", nargs="+", type=int, default=[1, 2, 4, 8], help="micro-batches over pp")
    parser.add_argument("--schedules", nargs="+", default=list(PIPELINE_SCHEDULES), help="which schedules")
    parser.add_argument("--bare", action="store_true", help="torch's own stages and schedules, without ours")
    parser.add_argument("--unit", type=float, default=1000 * UNIT, help="milliseconds of each piece of work")
    parser.add_argument("--repeats", type=int, default=3, help="steps of each case; the median counts")
    options = parser.parse_args()
    set_unit(options.unit)
    print(f"torch {torch.__version__}, {UNIT * 1000:g} ms a unit")
    print("schedule | pp | micro-batches | idle in theory | measured s | theory s | beyond theory")
    for pp in options.pp:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with multiprocessing.get_context("spawn").Pool(pp) as pool:
            rest = (options.schedules, options.factors, options.bare, options.unit, options.repeats)
            tasks = [(rank, pp, port, *rest) for rank in range(pp)]
            measured = pool.starmap(run_rank, tasks, chunksize=1)[0]
        for (schedule, count), seconds in measured.items():
            ideal = timeline(layout(schedule, pp), count)
            expected = ideal.duration * UNIT
            print(
                f"{schedule} | {pp} | {count} | {100 * ideal.theory:.2f} % | {seconds:.3f} | {expected:.3f} | "
                f"{100 * (seconds / expected - 1):.2f} %",
                flush=True,
            )


if __name__ == "__main__":
    main()
