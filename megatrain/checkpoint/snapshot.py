"""A rank's part in the saves of a run: what it holds, what it copies aside, what it writes."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.checkpoint.errors import CheckpointError
from megatrain.checkpoint.placement import Placement, place, saves, sharing_ranks
from megatrain.checkpoint.shares import Chunk, Part, Plan, chunk_limit, plan_shares
from megatrain.checkpoint.store import CheckpointWriter
from megatrain.engine.engine import Engine
from megatrain.engine.state import KINDS, local_fragments

PieceKey = tuple[str, str, int]  # kind, name, first element
_BYTES = 4  # of an element: all state is FP32


class Shares:
    """Who writes what, in every save of ``engine``. Collective over ``group``, whose ranks may be on any thread.

    Args:
        group: all ranks, by gloo; nothing else may use it while a save is under way.
    """

    def __init__(self, engine: Engine, group: dist.ProcessGroup):
        self.engine, self.group = engine, group
        self.ranks = sharing_ranks(engine)
        self.position = self.ranks.index(engine.mesh.rank)
        self.placements: dict[str, Placement] = {name: place(engine, p) for name, p in engine.parameters}
        self.plan = self._make_plan()
        self.own_bytes = sum(c.size for c in self.plan.chunks if c.owner == self.position) * _BYTES * len(KINDS)
        total = torch.tensor(self.own_bytes)
        dist.all_reduce(total, group=group)
        self.total_bytes = int(total)

    def _make_plan(self) -> Plan:
        held: list[Any] = [None] * dist.get_world_size(self.group)
        own = {fragment.name: (fragment.start, fragment.size) for fragment in local_fragments(self.engine)}
        dist.all_gather_object(held, own, group=self.group)
        parts = []
        for name, where in self.placements.items():
            ranges = {i: held[rank][name] for i, rank in enumerate(self.ranks) if name in held[rank]}
            row_elements = torch.Size(where.shape[1:]).numel()
            parts.append(Part(name, where.rows, row_elements, ranges, even=where.splits_rows))
        limit = chunk_limit(parts, len(self.ranks))
        parameters = dict(self.engine.parameters)
        return plan_shares(
            [part for part in parts if saves(self.engine, parameters[part.name])], len(self.ranks), limit
        )

    def pieces(self) -> dict[PieceKey, Tensor]:
        """What this rank contributes to chunks: flat FP32 views of the live state."""
        fragments = {fragment.name: fragment for fragment in local_fragments(self.engine)}
        pieces = {}
        for kind in KINDS:
            values = {name: fragment.values(kind) for name, fragment in fragments.items()}
            for chunk in self.plan.chunks:
                for rank, start, size in chunk.pieces:
                    if rank == self.position:
                        first = start - fragments[chunk.name].start
                        pieces[kind, chunk.name, start] = values[chunk.name][first : first + size]
        return pieces


class Staging:
    """Host memory that a snapshot is copied to, pinned where there are GPUs; made once and used by every save."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def copy(self, pieces: Mapping[PieceKey, Tensor]) -> dict[PieceKey, Tensor]:
        """Copies of ``pieces`` that the next step does not change; those of the last call are overwritten."""
        total = sum(piece.numel() for piece in pieces.values())
        if self._buffer.numel() < total:
            self._buffer = torch.empty(0)  # given back before more is asked for
            self._buffer = torch.empty(total, pin_memory=torch.cuda.is_available())
        copies, place = {}, 0
        for key, piece in pieces.items():
            copies[key] = self._buffer[place : place + piece.numel()]
            copies[key].copy_(piece, non_blocking=True)
            place += piece.numel()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copies


def write_shares(shares: Shares, pieces: Mapping[PieceKey, Tensor], writer: CheckpointWriter) -> str | None:
    """Writes this rank's chunks; what other ranks hold of them is exchanged round by round.

    Returns the first problem: after one the exchange goes on to its end, or the others would wait forever.
    """
    problem = None
    for kind in KINDS:
        for chunks in shares.plan.rounds:
            sends = _send_pieces(shares, kind, chunks, pieces)
            own = next((chunk for chunk in chunks if chunk.owner == shares.position), None)
            if own is not None:
                values = _assembled(shares, kind, own, pieces)
                problem = problem or _write(shares, kind, own, values, writer)
            for _, work in sends:  # the tensor is kept until it is sent
                work.wait()
    return problem


def _send_pieces(
    shares: Shares, kind: str, chunks: list[Chunk], pieces: Mapping[PieceKey, Tensor]
) -> list[tuple[Tensor, Any]]:
    sends = []
    for chunk in chunks:
        for rank, start, _ in chunk.pieces:
            if rank == shares.position != chunk.owner:
                tensor = pieces[kind, chunk.name, start].cpu()
                sends.append((tensor, dist.isend(tensor, shares.ranks[chunk.owner], group=shares.group)))
    return sends


def _assembled(shares: Shares, kind: str, chunk: Chunk, pieces: Mapping[PieceKey, Tensor]) -> Tensor:
    """All elements of an own chunk, on the host; without a copy where they lie there in one piece."""
    if len(chunk.pieces) == 1 and chunk.pieces[0][0] == shares.position:
        return pieces[kind, chunk.name, chunk.start].cpu()
    values = torch.empty(chunk.size)
    for rank, start, size in chunk.pieces:
        target = values[start - chunk.start : start - chunk.start + size]
        if rank == shares.position:
            target.copy_(pieces[kind, chunk.name, start])
        else:
            dist.recv(target, shares.ranks[rank], group=shares.group)
    return values


def _write(shares: Shares, kind: str, chunk: Chunk, values: Tensor, writer: CheckpointWriter) -> str | None:
    where = shares.placements[chunk.name]
    rest = where.shape[1:]
    offset, chunk_shape, shape = where.offset, where.shape, where.shape
    if where.shape:
        offset = (where.offset[0] + chunk.first_row, *where.offset[1:])
        chunk_shape = (chunk.chunk_rows, *rest)
        shape = (-1, *rest)
    try:
        writer.write(
            kind,
            chunk.name,
            values.detach().view(shape).numpy(),
            offset=offset,
            full_shape=where.full_shape,
            chunk_shape=chunk_shape,
        )
    except CheckpointError as error:
        return str(error)
    return None
