"""Restores the training state of an engine from a checkpoint of any layout."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.checkpoint.errors import CheckpointError, UnfitError
from megatrain.checkpoint.parts import ReadPart, Rows, rows_of, unproved
from megatrain.checkpoint.placement import place
from megatrain.checkpoint.state import require_state
from megatrain.checkpoint.store import CheckpointReader
from megatrain.config.schema import ModelConfig
from megatrain.engine.engine import Engine
from megatrain.engine.kinds import WEIGHT
from megatrain.engine.state import (
    Fragment,
    factors,
    finish_import,
    kinds_of,
    local_fragments,
    prepare_import,
    set_optimizer_step_count,
)

_READERS = min(4, len(os.sched_getaffinity(0)))  # threads; so many fragments may be in memory beside the state


Result = TypeVar("Result")
ResumeData = Callable[[dict[str, Any], int], None]
"""Is given what a checkpoint holds under ``data`` and its step; raises UnfitError where the data can't go on there."""


def load_checkpoint(engine: Engine, path: Path, resume_data: ResumeData) -> dict[str, Any]:
    """Restores weights, moments, update count and loss scaler; each rank reads only the chunks that it needs.

    Args:
        resume_data: called before anything is restored.
    Returns: the manifest's state (``step``, ``data``, …).
    Raises:
        UnfitError: of another model or data (all differing fields are listed).
        CheckpointError: damaged, on every rank if on any; the engine's state is then undefined.
    """
    loading = _Loading(engine, path, resume_data)
    told = _on_every_rank(loading.read)
    if any(len(rows) for rows in told):
        _on_every_rank(lambda: loading.read_again(unproved(loading.parts, told)))
    reader = loading.reader
    finish_import(engine)
    set_optimizer_step_count(engine, reader.state["optimizer_steps"])
    engine.routers.load_biases(reader.state["router_biases"])
    if engine.config.precision.dtype == reader.state["dtype"]:
        engine.load_loss_scaler_state(reader.state["loss_scaler"])
    return reader.state


def _on_every_rank(action: Callable[[], Result]) -> list[Result]:
    """What ``action`` gives, by rank. Raises CheckpointError on all ranks if on any."""
    told: list[tuple[Result | None, CheckpointError | None]] = [(None, None)] * dist.get_world_size()
    try:
        own: tuple[Result | None, CheckpointError | None] = (action(), None)
    except CheckpointError as error:
        own = (None, error)
    dist.all_gather_object(told, own)
    for problem in filter(None, (problem for _, problem in told)):
        raise problem
    return [result for result, _ in told]  # type: ignore[misc]


def require_same_model(reader: CheckpointReader, model: ModelConfig) -> None:
    """Refuses a checkpoint whose weights are another model's. Dropout and side losses do not shape the weights.

    Raises:
        UnfitError: lists every field that differs.
    """
    ignored = ("dropout", "attention_dropout", "init_std", "router_balance_loss", "router_z_loss")
    wanted = {field: value for field, value in model.model_dump(mode="json").items() if field not in ignored}
    _require_equal(reader, "model", reader.state["model"], wanted)


def _require_equal(reader: CheckpointReader, section: str, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    different = [
        f"{section}.{field}: {saved.get(field)!r} saved, {value!r} asked"
        for field, value in wanted.items()
        if saved.get(field) != value
    ]
    if different:
        listed = "\n  ".join(different)
        raise UnfitError(
            f"{reader.path} was made with another {section}:\n  {listed}\nuse the saved values, or another run folder"
        )


@dataclass(frozen=True)
class _Read:
    """``kind`` of a fragment: the region of the array that has it, in whole rows, and how many elements lie before it.

    ``memory``: of the live state, where the region may be read to at once. ``parts``: gets what was read of chunks
    without a proof; None: all is proved as it is read.
    """

    kind: str
    fragment: Fragment
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    before: int
    memory: Tensor | None
    parts: list[ReadPart] | None

    def in_place(self, reader: CheckpointReader) -> None:
        """Reads into ``memory``."""
        assert self.memory is not None
        out = self.memory.numpy().reshape(self.shape)
        reader.read(self.kind, self.fragment.name, self.offset, self.shape, out, self.parts)

    def values(self, reader: CheckpointReader) -> Tensor:
        """[size] FP32; zeros of a moment that the checkpoint lacks: of a converted model, or another optimizer."""
        if self.kind != WEIGHT and (self.kind, self.fragment.name) not in reader.arrays:
            return torch.zeros(self.fragment.size)
        rows = torch.from_numpy(reader.read(self.kind, self.fragment.name, self.offset, self.shape)).flatten()
        return rows[self.before : self.before + self.fragment.size]


class _Loading:
    """Reads in threads: straight into the state where it lies in memory, else a few fragments ahead of setting them."""

    reader: CheckpointReader

    def __init__(self, engine: Engine, path: Path, resume_data: ResumeData):
        self._engine, self._path, self._resume_data = engine, path, resume_data
        self._reads: list[_Read] = []

    @property
    def parts(self) -> list[ReadPart]:
        """Of chunks, read without a proof."""
        return [part for read in self._reads for part in read.parts or ()]

    def read(self) -> Rows:
        """Opens the checkpoint and reads all; returns ``parts``, to be told to the other ranks."""
        self.reader = CheckpointReader(self._path)
        require_state(self.reader)
        require_same_model(self.reader, self._engine.config.model)
        self._resume_data(self.reader.state["data"], self.reader.state["step"])
        prepare_import(self._engine)
        fragments = local_fragments(self._engine)
        self._reads = [read for fragment in fragments for read in _reads(fragment, self._engine, self.reader)]
        self._carry_out(self._reads)
        for key, factor in factors(self._engine).items():
            present = key in self.reader.arrays
            factor.copy_(torch.from_numpy(self.reader.read(*key)) if present else torch.zeros(factor.shape))
        return rows_of(self.parts)

    def read_again(self, chunks: set[int]) -> None:
        """Reads whole what has parts of ``chunks``: each rank then proves them for itself, or names what is damaged."""
        doubtful = [read for read in self._reads if any(part.chunk in chunks for part in read.parts or ())]
        self._carry_out([replace(read, parts=None) for read in doubtful])

    def _carry_out(self, reads: Sequence[_Read]) -> None:
        with ThreadPoolExecutor(_READERS, "checkpoint-read") as pool:
            work = iter([read for read in reads if read.memory is not None])
            for done in [pool.submit(_read_all, work, self.reader) for _ in range(_READERS)]:
                done.result()
            for read, values in _ahead(pool, iter([read for read in reads if read.memory is None]), self.reader):
                read.fragment.set(read.kind, values.to(self._engine.mesh.device))


def _reads(fragment: Fragment, engine: Engine, reader: CheckpointReader) -> Iterator[_Read]:
    where = place(engine, fragment.parameter)
    row_elements = torch.Size(where.shape[1:]).numel()
    first = fragment.start // row_elements
    last = -(-(fragment.start + fragment.size) // row_elements)
    offset, shape = where.offset, where.shape
    if where.shape:
        offset = (where.offset[0] + first, *where.offset[1:])
        shape = (last - first, *where.shape[1:])
    for kind in kinds_of(engine, fragment.parameter):
        fits = (kind, fragment.name) in reader.arrays and fragment.size == torch.Size(shape).numel()
        memory = fragment.memory(kind) if fits else None
        yield _Read(kind, fragment, offset, shape, fragment.start - first * row_elements, memory, [])


def _read_all(work: Iterator[_Read], reader: CheckpointReader) -> None:
    """One thread's part of ``work``, a list's iterator that all threads take from; an error ends it for all."""
    try:
        for read in work:
            read.in_place(reader)
    finally:
        deque(work, maxlen=0)


def _ahead(pool: ThreadPoolExecutor, work: Iterator[_Read], reader: CheckpointReader) -> Iterator[tuple[_Read, Tensor]]:
    queue: deque[tuple[_Read, Future[Tensor]]] = deque()
    while True:
        for read in islice(work, _READERS - len(queue)):
            queue.append((read, pool.submit(read.values, reader)))
        if not queue:
            return
        read, future = queue.popleft()
        yield read, future.result()
