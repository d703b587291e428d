"""Where functions run: in this process, in processes of this host, or on the other ranks of an MPI job."""

import collections
import concurrent.futures
import concurrent.futures.process
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from megatrain.config.extras import missing
from megatrain.data.errors import DataError

T = TypeVar("T")
R = TypeVar("R")

_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE", "MPI_LOCALNRANKS")  # set by mpirun and srun --mpi


class Pool:
    """Runs a function on many items and gives the results in the items' order.

    ``executor`` None: in this process.
    """

    def __init__(self, executor: concurrent.futures.Executor | None, num_workers: int):
        self._executor = executor
        self.num_workers = num_workers

    def ordered(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[tuple[T, R]]:
        """Each item with its result; two items a worker are under way at a time.

        Raises:
            DataError: a worker process died.
        """
        if self._executor is None:
            yield from ((item, function(item)) for item in items)
            return
        pending: collections.deque[tuple[T, concurrent.futures.Future[R]]] = collections.deque()
        try:
            for item in items:
                pending.append((item, self._executor.submit(function, item)))
                if len(pending) == 2 * self.num_workers:
                    oldest, future = pending.popleft()
                    yield oldest, future.result()
            while pending:
                oldest, future = pending.popleft()
                yield oldest, future.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise DataError("a worker process died (out of memory?): try fewer --workers") from error
        finally:
            for _, future in pending:
                future.cancel()


@contextlib.contextmanager
def open_pool(num_workers: int) -> Iterator[Pool]:
    """A pool of processes on this host; one worker is this process itself."""
    if num_workers == 1:
        yield Pool(None, 1)
        return
    # A forked worker has all that is imported and loaded; one that is spawned takes half a second for that.
    fork = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(num_workers, fork, _start_worker) as executor:
        executor.submit(
            int
        ).result()  # forks all of them now, before there are locked files and a progress bar's thread
        yield Pool(executor, num_workers)


@contextlib.contextmanager
def open_mpi_pool() -> Iterator[Pool | None]:
    """A pool of all other ranks on rank 0 of an MPI job. They serve it here, and get None when it closes.

    Raises:
        DataError: mpi4py is not installed.
    """
    try:
        from mpi4py import MPI
        from mpi4py.futures import MPICommExecutor
    except ImportError as error:
        raise DataError(missing("mpi4py", "a run under mpirun", error)) from error
    size = MPI.COMM_WORLD.Get_size()
    if size == 1:
        yield Pool(None, 1)
        return
    with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:
        yield None if executor is None else Pool(executor, size - 1)  # type: ignore[arg-type]


def runs_under_mpi() -> bool:
    """Whether mpirun, or another starter of MPI jobs, started this process."""
    return any(name in os.environ for name in _MPI_SIZES)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
