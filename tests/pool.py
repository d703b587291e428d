"""Worker processes that are started once per test run and then serve every layout.

Importing torch, DeepSpeed and megatron-core costs seconds a process, so one process does it and the workers are
forked from it. For each call the first ``world_size`` workers form a fresh gloo world.
"""

import gc
import multiprocessing as mp
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil


class WorkerFailure(AssertionError):
    """A worker raised; the text holds its traceback."""


class Pool:
    """``run(function, world_size, ...)`` calls ``function(...)`` on each rank of a gloo world.

    ``timeout`` in seconds; workers that hold more than ``memory`` bytes or ``threads`` are replaced.
    """

    def __init__(self, size: int, timeout: float = 180.0, memory: int = 2**30, threads: int = 100):
        self.size, self.timeout, self.memory, self.threads = size, timeout, memory, threads
        self._folder = tempfile.TemporaryDirectory(prefix="megatrain-pool-")
        self._calls = 0
        self._workers: list[tuple[mp.process.BaseProcess, Connection]] = []

    def run(
        self,
        function: Callable[..., Any],
        world_size: int,
        *args: Any,
        placement: Sequence[int] | None = None,
        **options: Any,
    ) -> list[Any]:
        """Results by rank. ``placement``: the worker of each rank, else its own number.

        A worker that fails or hangs ends the pool's processes; the next call starts new ones.
        """
        self._start()
        self._calls += 1
        store = str(Path(self._folder.name) / f"store-{self._calls}")
        pipes = [self._workers[worker][1] for worker in placement or range(world_size)]
        for rank, pipe in enumerate(pipes):
            pipe.send((function, rank, world_size, store, args, options))
        results = self._collect(pipes)
        workers = [psutil.Process(process.pid) for process, _ in self._workers]
        if any(w.memory_info().rss > self.memory or w.num_threads() > self.threads for w in workers):
            self.dismiss()  # what compilers and libraries keep of each engine adds up, and gloo's threads never rest
        return results

    def _collect(self, pipes: list[Connection]) -> list[Any]:
        results: dict[int, Any] = {}
        while len(results) < len(pipes):
            pending = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
            ready = wait(pending, timeout=self.timeout)
            if not ready:
                self.close()
                raise WorkerFailure(
                    f"no answer within {self.timeout} s from ranks {set(range(len(pipes))) - set(results)}"
                )
            for pipe in ready:
                rank = pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    ok, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    ok, value = False, f"rank {rank} of {len(pipes)} ended without an answer"
                if not ok:
                    self.close()
                    raise WorkerFailure(value)
                results[rank] = value
        return [results[rank] for rank in range(len(pipes))]

    def _start(self) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["megatrain.parity.preload"])
        while len(self._workers) < self.size:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            self._workers.append((process, ours))

    def dismiss(self) -> None:
        """Lets the workers end by themselves, as a measurement of coverage needs it; those that don't are killed."""
        for _, pipe in self._workers:
            pipe.close()
        end = time.monotonic() + 10
        for process, _ in self._workers:
            process.join(max(0.0, end - time.monotonic()))
        self.close()

    def close(self) -> None:
        for process, _ in self._workers:
            process.kill()
        for process, _ in self._workers:
            process.join()
        self._workers.clear()


def _serve(pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, rank, world_size, store, args, options = pipe.recv()
        except EOFError:  # nobody is left to ask
            return
        gc.collect()  # engines are cycles
        gc.freeze()  # what the libraries hold is not looked through again: a second per rank and engine
        try:
            with_fresh_world(rank, world_size, store)
            pipe.send((True, function(*args, **options)))
        except BaseException:
            pipe.send((False, f"rank {rank} of {world_size}:\n{traceback.format_exc()}"))


def with_fresh_world(rank: int, world_size: int, store: str) -> None:
    """Ends the previous world and joins a new one; clears the groups that DeepSpeed and megatron-core keep."""
    import sys

    import deepspeed.comm.comm
    import torch
    import torch.distributed as dist
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups

    from megatrain.engine.zero.leftovers import clear_leftovers

    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
    deepspeed.comm.comm.cdb = None
    # ZeRO-3 numbers parameters and modules per process and compares the numbers between ranks; the workers
    # of one world served different numbers of engines before
    Init.param_id = 0
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    for name, value in vars(groups).items():
        if name.startswith("_") and name.isupper():
            setattr(groups, name, {} if isinstance(value, dict) else None)
    groups.mpu = None
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    clear_leftovers()  # of engines that were not closed
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if "megatrain.parallel.tensor" in sys.modules:
        sys.modules["megatrain.parallel.tensor"].forget_groups()
