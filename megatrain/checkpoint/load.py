"""Restores the training state of an engine from a checkpoint of any layout."""

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.checkpoint.errors import CheckpointError, UnfitError
from megatrain.checkpoint.placement import place
from megatrain.checkpoint.store import CheckpointReader
from megatrain.config.schema import ModelConfig
from megatrain.engine.engine import Engine
from megatrain.engine.state import (
    WEIGHT,
    Fragment,
    factors,
    finish_import,
    kinds_of,
    local_fragments,
    prepare_import,
    set_optimizer_step_count,
)

_READERS = min(4, len(os.sched_getaffinity(0)))  # threads; so many fragments may be in memory beside the state


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
    problem: CheckpointError | None = None
    try:
        reader = CheckpointReader(path)
        require_same_model(reader, engine.config.model)
        resume_data(reader.state["data"], reader.state["step"])
        _read_state(reader, engine)
    except CheckpointError as error:
        problem = error
    problems: list[CheckpointError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for found in filter(None, problems):
        raise found
    finish_import(engine)
    set_optimizer_step_count(engine, reader.state["optimizer_steps"])
    engine.routers.load_biases(reader.state["router_biases"])
    if engine.config.precision.dtype == reader.state["dtype"]:
        engine.load_loss_scaler_state(reader.state["loss_scaler"])
    return reader.state


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

    ``memory``: of the live state, where the region may be read to at once.
    """

    kind: str
    fragment: Fragment
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    before: int
    memory: Tensor | None

    def in_place(self, reader: CheckpointReader) -> None:
        """Reads into ``memory``."""
        assert self.memory is not None
        reader.read(self.kind, self.fragment.name, self.offset, self.shape, self.memory.numpy().reshape(self.shape))

    def values(self, reader: CheckpointReader) -> Tensor:
        """[size] FP32; zeros of a moment that the checkpoint lacks: of a converted model, or another optimizer."""
        if self.kind != WEIGHT and (self.kind, self.fragment.name) not in reader.arrays:
            return torch.zeros(self.fragment.size)
        rows = torch.from_numpy(reader.read(self.kind, self.fragment.name, self.offset, self.shape)).flatten()
        return rows[self.before : self.before + self.fragment.size]


def _read_state(reader: CheckpointReader, engine: Engine) -> None:
    """Reads in threads: straight into the state where it lies in memory, else a few fragments ahead of setting them."""
    prepare_import(engine)
    reads = [read for fragment in local_fragments(engine) for read in _reads(fragment, engine, reader)]
    with ThreadPoolExecutor(_READERS, "checkpoint-read") as pool:
        work = iter([read for read in reads if read.memory is not None])
        for done in [pool.submit(_read_all, work, reader) for _ in range(_READERS)]:
            done.result()
        for read, values in _ahead(pool, iter([read for read in reads if read.memory is None]), reader):
            read.fragment.set(read.kind, values.to(engine.mesh.device))
    for key, factor in factors(engine).items():
        factor.copy_(torch.from_numpy(reader.read(*key)) if key in reader.arrays else torch.zeros(factor.shape))


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
        yield _Read(kind, fragment, offset, shape, fragment.start - first * row_elements, memory)


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
