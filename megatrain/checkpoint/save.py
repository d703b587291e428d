"""Saves a run, whatever its layout: copied aside at once, written while training goes on, committed together."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from megatrain.checkpoint.snapshot import PieceKey, Shares, Staging, sizes, write_shares
from megatrain.checkpoint.store.arrays import CheckpointWriter
from megatrain.checkpoint.store.errors import PAUSES, CheckpointError, TransientError
from megatrain.checkpoint.store.folder import checkpoint_name, require_free_space
from megatrain.checkpoint.store.lock import FolderLock
from megatrain.checkpoint.store.retention import Retention, prune
from megatrain.checkpoint.store.tokenizer_file import CarriedTokenizer
from megatrain.engine.engine import Engine
from megatrain.engine.state import optimizer_step_count
from megatrain.parallel.mesh import group_of

Result = TypeVar("Result")

_LONGEST_SAVE = timedelta(hours=6)  # that a rank waits for the others


@dataclass(frozen=True)
class Outcome:
    """How a save ended, the same on every rank. ``notes``: what a person should know, problem or not.

    ``seconds``: from the call to the commit; ``stall_seconds``: training stood still; ``num_bytes``: of all ranks.
    """

    step: int
    path: Path
    problem: str | None
    notes: tuple[str, ...]
    seconds: float
    stall_seconds: float
    num_bytes: int


@dataclass(frozen=True)
class _Job:
    """One save: what it writes, and ``problem``, which kept this rank from copying it. ``start``: of the clock."""

    start: float
    step: int
    state: dict[str, Any]
    versions: Mapping[str, str]
    pieces: Mapping[PieceKey, Tensor]
    problem: CheckpointError | None


class Saver:
    """The saves of one run, one at a time. Every method is collective: all ranks call it at the same step.

    Args:
        folder: the run's checkpoints.
        run_id: stored with every array; rank 0's counts.
        background: copy the state to host memory and write it in a thread, or write it before ``begin`` returns.
        retention: applied after each commit.
        lock: of the folder, held by rank 0.
        damaged: steps that can't be loaded, which retention doesn't count.
        tokenizer: goes into each checkpoint.
    """

    def __init__(
        self,
        engine: Engine,
        folder: Path,
        run_id: str,
        *,
        background: bool = True,
        retention: Retention | None = None,
        lock: FolderLock | None = None,
        damaged: frozenset[int] = frozenset(),
        tokenizer: CarriedTokenizer | None = None,
    ):
        self.engine, self.folder = engine, folder
        self.background, self.retention, self.lock = background, retention or Retention(), lock
        self._damaged, self._tokenizer = set(damaged), tokenizer
        # of its own: the threads of a save talk to each other while training uses the other groups
        everybody = list(range(dist.get_world_size()))
        self._group = group_of("save", everybody, backend="gloo", timeout=_LONGEST_SAVE)
        self.run_id = self._gathered(run_id)[0]  # the array headers that this rank writes name it, too
        self._shares = Shares(engine, self._group)
        self._staging = Staging()
        self._thread: Thread | None = None
        self._outcome: Outcome | None = None
        self._stalled = 0.0

    def begin(self, step: int, state: Mapping[str, Any], versions: Mapping[str, str]) -> None:
        """Saves the state after ``step``. The one before must have been finished. Problems come with ``finish``.

        Args:
            state: what only the caller knows, as JSON: data, tokens, …
        """
        assert self._thread is None and self._outcome is None, "finish the save before this one"
        start = time.perf_counter()
        whole_state = {**_engine_state(self.engine, step), **state}
        pieces: dict[PieceKey, Tensor] = {}
        problem: CheckpointError | None = None
        try:
            pieces = self._shares.pieces()
            if self.background:
                pieces = self._staging.copy(pieces)
        except (RuntimeError, MemoryError) as error:
            size = sizes(pieces) or f"{self._shares.own_bytes} bytes"
            problem = CheckpointError(
                f"no memory to copy this rank's state aside ({size}): {error}. Give the host more memory or "
                "fewer ranks, or set checkpoint.background: false, which copies nothing while training waits"
            )
        job = _Job(start, step, whole_state, versions, pieces, problem)
        if self.background:
            self._thread = Thread(target=self._save, args=(job,), name=f"save-{step}", daemon=True)
            self._thread.start()
        else:
            self._save(job)
        self._stalled = time.perf_counter() - start

    @property
    def has_news(self) -> bool:
        """Whether the save in flight has ended on this rank; on the others it has, too, or is about to."""
        return self._outcome is not None

    def finish(self) -> Outcome | None:
        """Waits for the save in flight and tells how it ended; None if there was none since the last call."""
        start = time.perf_counter()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        outcome, self._outcome = self._outcome, None
        waited = time.perf_counter() - start
        return outcome and replace(outcome, stall_seconds=self._stalled + waited)

    def _save(self, job: _Job) -> None:
        """All attempts: more than one where the file system fails in a way that may pass."""
        notes: list[str] = []
        for attempt, pause in enumerate((*PAUSES, None), 1):
            found, new_notes = self._attempt(job)
            notes += new_notes
            if pause is None or not isinstance(found, TransientError):
                break
            again = f"the next one begins in {pause:.0f} s"
            notes.append(f"attempt {attempt} to save step {job.step} failed, {again}: {found}")
            time.sleep(pause)
        text = None if found is None else f"{found}; tried {attempt} times" if attempt > 1 else str(found)
        path = self.folder / checkpoint_name(job.step)
        seconds = time.perf_counter() - job.start
        self._outcome = Outcome(job.step, path, text, tuple(notes), seconds, seconds, self._shares.total_bytes)

    def _attempt(self, job: _Job) -> tuple[CheckpointError | None, list[str]]:
        writer = CheckpointWriter(self.folder, job.step, self.run_id)
        try:
            return self._write(job, writer)
        except Exception as error:  # a thread has nobody above it
            return CheckpointError(f"{type(error).__name__}: {error}"), []
        finally:
            writer.close()

    def _write(self, job: _Job, writer: CheckpointWriter) -> tuple[CheckpointError | None, list[str]]:
        """All steps of a save, each agreed on by all ranks; returns what rank 0 says: problem and notes."""
        problem: CheckpointError | None = job.problem
        notes: list[str] = []
        if self._is_first and problem is None:
            problem, notes = _told(lambda: self._prepare(writer))
        if problem := _worst(self._gathered(problem)):
            return problem, notes
        problem = write_shares(self._shares, job.pieces, writer)
        late_problem, records = _told(writer.records)
        everything = self._gathered((problem or late_problem, records))
        problem = _worst([error for error, _ in everything])
        if self._is_first:
            if problem is None:
                all_records = [record for _, rank_records in everything for record in rank_records]
                problem, _ = _told(lambda: self._commit(writer, all_records, job))
            notes += writer.notes
            if problem is None:
                notes += self._after_commit(job.step)
            else:
                writer.close()
                writer.discard()
        outcome = [(problem, notes)]
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        return outcome[0]

    def _after_commit(self, step: int) -> list[str]:
        """Removes what retention gives up; what fails now does not fail the save."""
        self._damaged.discard(step)
        problem, removed = _told(lambda: prune(self.folder, self.retention, self._damaged))
        return [f"removed {path}" for path in removed] + ([str(problem)] if problem else [])

    @property
    def _is_first(self) -> bool:
        return self.engine.mesh.rank == 0

    def _prepare(self, writer: CheckpointWriter) -> list[str]:
        if self.lock is not None:
            self.lock.require()
        require_free_space(self.folder, self._shares.total_bytes)
        return [f"removed {stump}, left by a save that was killed" for stump in writer.prepare()]

    def _commit(self, writer: CheckpointWriter, records: list[dict[str, Any]], job: _Job) -> list[Path]:
        if self.lock is not None:  # a second signal may have ended the run, and given the folder back, meanwhile
            self.lock.require()
        state = job.state
        if self._tokenizer is not None:
            self._tokenizer.write(writer.partial)
            state = {**state, "tokenizer": self._tokenizer.state()}
        return [writer.commit(records, state, job.versions)]

    def _gathered(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(values, value, group=self._group)
        return values


def save_checkpoint(
    engine: Engine,
    folder: Path,
    step: int,
    run_id: str,
    data_state: Mapping[str, Any],
    versions: Mapping[str, str] | None = None,
) -> Path:
    """One save by itself, committed when it returns. Collective.

    Raises:
        CheckpointError: on every rank, when any rank could not write; older checkpoints are untouched.
    """
    saver = Saver(engine, folder, run_id, background=False)
    saver.begin(step, {"data": dict(data_state)}, versions or {})
    outcome = saver.finish()
    assert outcome is not None
    if outcome.problem:
        raise CheckpointError(f"checkpoint of step {step} not saved: {outcome.problem}")
    return outcome.path


def _engine_state(engine: Engine, step: int) -> dict[str, Any]:
    return {
        "step": step,
        "optimizer_steps": optimizer_step_count(engine),
        "dtype": engine.config.precision.dtype,
        "loss_scaler": engine.loss_scaler_state(),
        "router_biases": engine.routers.saved_biases(),
        # sample order and dropout are functions of these and the step: there is no generator to save
        "seeds": {"train": engine.config.train.seed, "data": engine.config.data.seed},
        "model": engine.config.model.model_dump(mode="json"),
        # rates and decays are functions of the step and of this
        "config": engine.config.model_dump(mode="json"),
    }


def _told(action: Callable[[], list[Result]]) -> tuple[CheckpointError | None, list[Result]]:
    """(problem, result): an action of one rank, whose failure the others must hear of."""
    try:
        return None, action()
    except CheckpointError as error:
        return error, []


def _worst(problems: list[CheckpointError | None]) -> CheckpointError | None:
    """The gravest of all ranks' problems, with its rank: one that stays goes before one that may pass."""
    found = [(rank, error) for rank, error in enumerate(problems) if error is not None]
    if not found:
        return None
    rank, error = min(found, key=lambda entry: isinstance(entry[1], TransientError))
    return type(error)(f"rank {rank}: {error}")
