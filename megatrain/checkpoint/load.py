"""Restores the training state of an engine from a checkpoint of any layout."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.checkpoint.placement import placement_of
from megatrain.checkpoint.state import described_model, require_state
from megatrain.checkpoint.store.arrays import CheckpointReader
from megatrain.checkpoint.store.errors import CheckpointError, UnfitError
from megatrain.checkpoint.store.parts import ReadPart, Rows, rows_of, unproved
from megatrain.engine.engine import Engine
from megatrain.engine.state import (
    factors,
    finish_import,
    kinds_of,
    local_fragments,
    prepare_import,
    set_optimizer_step_count,
)
from megatrain.engine.zero.fragments import Fragment
from megatrain.spec.keys import flat
from megatrain.spec.kinds import WEIGHT
from megatrain.spec.schema import ModelSpec

_READERS = min(4, len(os.sched_getaffinity(0)))  # threads; so many fragments may be in memory beside the state


Result = TypeVar("Result")
What = Literal["weights", "weights_and_optimizer", "all"]
ResumeData = Callable[[dict[str, Any], int], None]
"""Is given what a checkpoint holds under ``data`` and its step; raises UnfitError where the data can't go on there."""


def load_checkpoint(
    engine: Engine, path: Path, resume_data: ResumeData, what: What = "all", grow: bool = False
) -> dict[str, Any]:
    """Restores weights, moments, update count and loss scaler; each rank reads only the chunks that it needs.

    Args:
        resume_data: called before anything is restored, where ``what`` is all.
        what: weights: moments, update count and loss scaler stay as they are in a new run, and so do steps and data;
            weights_and_optimizer: only steps and data do.
        grow: the vocabulary may have more rows than the checkpoint's; the new ones keep their initial weights.
    Returns: the manifest's state (``step``, ``data``, …).
    Raises:
        UnfitError: of another model or data (all differing fields are listed).
        CheckpointError: damaged, on every rank if on any; the engine's state is then undefined.
    """
    loading = _Loading(engine, path, resume_data, what, grow)
    told = _on_every_rank(loading.read)
    if any(len(rows) for rows in told):
        _on_every_rank(lambda: loading.read_again(unproved(loading.parts, told)))
    reader = loading.reader
    finish_import(engine)
    engine.routers.load_biases(reader.state["router_biases"])
    if what == "weights":
        return reader.state
    set_optimizer_step_count(engine, reader.state["optimizer_steps"])
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


def require_same_model(reader: CheckpointReader, model: ModelSpec, grow: bool = False) -> None:
    """Refuses a checkpoint whose weights have other shapes, or another meaning; ``grow`` as in ``load_checkpoint``.

    What the weights are trained with may change (experts' capacity, rotary frequencies, dropout): the resume tells it.

    Raises:
        UnfitError: lists every field that differs.
    """
    saved, wanted = (flat(spec.model_dump(mode="json")) for spec in (described_model(reader), model))
    different = {field for field, value in wanted.items() if saved.get(field) != value}
    in_the_way = {field for field in different if field in _SHAPES}
    if model.positions.kind == "learned" and "max_seq_len" in different:  # a row of the position table for each
        in_the_way.add("max_seq_len")
    if grow and "vocab_size" in different and (saved.get("vocab_size") or 0) < model.vocab_size:
        in_the_way.remove("vocab_size")
    if in_the_way:
        lines = [
            f"model.{field}: {saved.get(field)!r} saved, {wanted[field]!r} asked"
            + ("" if field in in_the_way else " (may change)")
            for field in wanted
            if field in different
        ]
        listed = "\n  ".join(lines)
        raise UnfitError(
            f"{reader.path} was made with another model:\n  {listed}\nuse the saved values, or another run folder"
        )


_READ = ("step", "optimizer_steps", "dtype", "loss_scaler", "router_biases", "model", "data")
"""What a load reads of a checkpoint's state; who resumes a run also wants its tokens (resume.py)."""

_SHAPES = (
    *("family", "num_layers", "hidden_size", "vocab_size", "tie_embeddings", "positions.kind", "norm.kind"),
    *("norm.placement", "norm.embedding", "positions.num_token_types", "head_transform"),
    *("attention.num_heads", "attention.num_kv_heads", "attention.head_width", "attention.bias"),
    *("attention.head_norms", "feed_forward.hidden_size", "feed_forward.activation", "feed_forward.bias"),
    *("experts.num_experts", "experts.hidden_size", "experts.num_shared", "experts.num_dense_layers"),
    "experts.interval",
)
"""Fields of the model that weights of another value can't be loaded into."""


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
        """[size] FP32, or less where the checkpoint has fewer rows; zeros of a moment that it lacks: of a converted
        model, or another optimizer."""
        if self.kind != WEIGHT and (self.kind, self.fragment.name) not in reader.arrays:
            return torch.zeros(self.fragment.size)
        if 0 in self.shape:
            return torch.zeros(0)
        rows = torch.from_numpy(reader.read(self.kind, self.fragment.name, self.offset, self.shape)).flatten()
        return rows[self.before : self.before + self.fragment.size]


class _Loading:
    """Reads in threads: straight into the state where it lies in memory, else a few fragments ahead of setting them."""

    reader: CheckpointReader

    def __init__(self, engine: Engine, path: Path, resume_data: ResumeData, what: What, grow: bool):
        self._engine, self._path, self._resume_data = engine, path, resume_data
        self._what, self._grow = what, grow
        self._reads: list[_Read] = []

    @property
    def parts(self) -> list[ReadPart]:
        """The parts of chunks that were read without a proof."""
        return [part for read in self._reads for part in read.parts or ()]

    def read(self) -> Rows:
        """Opens the checkpoint and reads all; returns ``parts``, to be told to the other ranks."""
        self.reader = CheckpointReader(self._path)
        require_state(self.reader, *_READ)
        require_same_model(self.reader, self._engine.config.model, self._grow)
        if self._what == "all":
            self._resume_data(self.reader.state["data"], self.reader.state["step"])
        only_weights = self._what == "weights"
        if not only_weights:
            prepare_import(self._engine)
        fragments = local_fragments(self._engine)
        reads = [read for fragment in fragments for read in _reads(fragment, self._engine, self.reader)]
        self._reads = [read for read in reads if read.kind == WEIGHT or not only_weights]
        self._carry_out(self._reads)
        for key, factor in factors(self._engine).items():
            factor.zero_()
            if key in self.reader.arrays and not only_weights:
                saved = torch.from_numpy(self.reader.read(*key))
                factor[: len(saved)].copy_(saved)
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
                if (missing := read.fragment.size - len(values)) > 0:  # rows that the checkpoint does not have
                    rest = read.fragment.values(read.kind)[-missing:].cpu()
                    values = torch.cat([values, rest if read.kind == WEIGHT else torch.zeros(missing)])
                read.fragment.set(read.kind, values.to(self._engine.mesh.device))


def _reads(fragment: Fragment, engine: Engine, reader: CheckpointReader) -> Iterator[_Read]:
    where = placement_of(engine, fragment.parameter)
    row_elements = torch.Size(where.shape[1:]).numel()
    first = fragment.start // row_elements
    last = -(-(fragment.start + fragment.size) // row_elements)
    offset, shape = where.offset, where.shape
    if where.shape:
        offset = (where.offset[0] + first, *where.offset[1:])
        shape = (last - first, *where.shape[1:])
    saved = reader.arrays.get((WEIGHT, fragment.name))
    if where.shape and saved is not None and saved.shape[0] < where.full_shape[0]:  # a vocabulary that has grown
        first_row = min(offset[0], saved.shape[0])
        offset, shape = (first_row, *offset[1:]), (min(shape[0], saved.shape[0] - first_row), *shape[1:])
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
