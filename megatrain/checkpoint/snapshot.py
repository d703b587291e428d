"""A rank's part in the saves of a run: what it holds, what it copies aside, what it writes."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.checkpoint.placement import Placement, is_saved_here, placement_of, sharing_ranks
from megatrain.checkpoint.shares import Chunk, LocalTensor, WriteRounds, chunk_limit, deal_out
from megatrain.checkpoint.store.arrays import CheckpointWriter
from megatrain.checkpoint.store.errors import CheckpointError
from megatrain.engine.engine import Engine
from megatrain.engine.state import factors, kinds_of, local_fragments
from megatrain.engine.zero.fragments import Fragment
from megatrain.spec.kinds import FACTORS, KINDS

PieceKey = tuple[str, str, int]  # kind, name, first element
_BYTES = 4  # of an element: all state is FP32


Held = list[dict[str, tuple[int, int]]]
"""By rank: name -> (start, size) of its fragment."""


class Shares:
    """Who writes what, in every save of ``engine``. Collective over ``group``, whose ranks may be on any thread.

    Args:
        group: all ranks, by gloo; nothing else may use it while a save is under way.
    """

    def __init__(self, engine: Engine, group: dist.ProcessGroup):
        self.engine = engine
        held: list[Any] = [None] * dist.get_world_size(group)
        own = {fragment.name: (fragment.start, fragment.size) for fragment in local_fragments(engine)}
        dist.all_gather_object(held, own, group=group)
        self.all_holders = [
            Holders(engine, group, ranks, names, held) for ranks, names in sharing_ranks(engine) if names
        ]
        own_elements = sum(holders.own_elements for holders in self.all_holders)
        own_elements += sum(values.numel() for values in self._factors().values())
        self.own_bytes = own_elements * _BYTES
        total = torch.tensor(self.own_bytes)
        dist.all_reduce(total, group=group)
        self.total_bytes = int(total)

    def pieces(self) -> dict[PieceKey, Tensor]:
        """What this rank contributes to chunks: flat FP32 views of the live state."""
        fragments = {fragment.name: fragment for fragment in local_fragments(self.engine)}
        pieces: dict[PieceKey, Tensor] = {}
        for holders in self.all_holders:
            pieces |= holders.pieces(fragments)
        return pieces | {(kind, name, 0): values for (kind, name), values in self._factors().items()}

    def _factors(self) -> dict[tuple[str, str], Tensor]:
        """The factors that this rank writes: the first of all ranks that hold them does."""
        if self.engine.mesh.coordinate("tp") > 0:
            return {}
        mine = {
            name
            for holders in self.all_holders
            if holders.position == 0
            for name in holders.placements
            if is_saved_here(self.engine, holders.parameters[name])
        }
        return {key: values for key, values in factors(self.engine).items() if key[1] in mine}


class Holders:
    """Ranks that hold the same parts of some parameters, and who of them writes what; ``position``: this rank's."""

    def __init__(self, engine: Engine, group: dist.ProcessGroup, ranks: list[int], names: list[str], held: Held):
        self.engine, self.group, self.ranks = engine, group, ranks
        self.position = ranks.index(engine.mesh.rank)
        self.parameters = {name: parameter for name, parameter in engine.parameters if name in names}
        self.placements: dict[str, Placement] = {name: placement_of(engine, self.parameters[name]) for name in names}
        self.writes = self._dealt_out(held)
        own = [(kind, chunk) for kind in KINDS for round_ in self.rounds(kind) for chunk in round_]
        self.own_elements = sum(chunk.size for _, chunk in own if chunk.owner == self.position)

    def rounds(self, kind: str) -> list[list[Chunk]]:
        """The rounds of writes, without parameters that have no such state."""
        having = {name for name, parameter in self.parameters.items() if kind in kinds_of(self.engine, parameter)}
        return [[chunk for chunk in chunks if chunk.name in having] for chunks in self.writes.rounds]

    def _dealt_out(self, held: Held) -> WriteRounds:
        parts = []
        for name, where in self.placements.items():
            ranges = {i: held[rank][name] for i, rank in enumerate(self.ranks) if name in held[rank]}
            row_elements = torch.Size(where.shape[1:]).numel()
            parts.append(LocalTensor(name, where.rows, row_elements, ranges, even=where.splits_rows))
        limit = chunk_limit(parts, len(self.ranks))
        own = [part for part in parts if is_saved_here(self.engine, self.parameters[part.name])]
        return deal_out(own, len(self.ranks), limit)

    def pieces(self, fragments: Mapping[str, Fragment]) -> dict[PieceKey, Tensor]:
        """This rank's part of the chunks."""
        pieces = {}
        for kind in KINDS:
            chunks = [chunk for round_ in self.rounds(kind) for chunk in round_]
            values = {
                name: fragments[name].values(kind) for name in {chunk.name for chunk in chunks} & fragments.keys()
            }
            for chunk in chunks:
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


def sizes(pieces: Mapping[PieceKey, Tensor]) -> str:
    """Says for people how large each kind of state is."""
    of_kind: dict[str, int] = {}
    for (kind, _, _), piece in pieces.items():
        of_kind[kind] = of_kind.get(kind, 0) + piece.numel() * _BYTES
    return ", ".join(f"{kind} {num_bytes / 2**20:.2f} MiB" for kind, num_bytes in of_kind.items())


def write_shares(shares: Shares, pieces: Mapping[PieceKey, Tensor], writer: CheckpointWriter) -> CheckpointError | None:
    """Writes this rank's chunks; what other ranks hold of them is exchanged round by round.

    Returns the first problem: after one the exchange goes on to its end, or the others would wait forever.
    """
    problem: CheckpointError | None = None
    for holders in shares.all_holders:
        for kind in KINDS:
            for chunks in holders.rounds(kind):
                sends = _send_pieces(holders, kind, chunks, pieces)
                own = next((chunk for chunk in chunks if chunk.owner == holders.position), None)
                if own is not None:
                    values = _assembled(holders, kind, own, pieces)
                    problem = problem or _write(holders, kind, own, values, writer)
                for _, work in sends:  # the tensor is kept until it is sent
                    work.wait()
    return problem or _write_factors(pieces, writer)


def _write_factors(pieces: Mapping[PieceKey, Tensor], writer: CheckpointWriter) -> CheckpointError | None:
    try:
        for (kind, name, _), values in pieces.items():
            if kind in FACTORS:
                writer.write(kind, name, values.detach().cpu().numpy(), offset=(0,), full_shape=values.shape)
    except CheckpointError as error:
        return error
    return None


def _send_pieces(
    holders: Holders, kind: str, chunks: list[Chunk], pieces: Mapping[PieceKey, Tensor]
) -> list[tuple[Tensor, Any]]:
    sends = []
    for chunk in chunks:
        for rank, start, _ in chunk.pieces:
            if rank == holders.position != chunk.owner:
                tensor = pieces[kind, chunk.name, start].cpu()
                sends.append((tensor, dist.isend(tensor, holders.ranks[chunk.owner], group=holders.group)))
    return sends


def _assembled(holders: Holders, kind: str, chunk: Chunk, pieces: Mapping[PieceKey, Tensor]) -> Tensor:
    """All elements of an own chunk, on the host; without a copy where they lie there in one piece."""
    if len(chunk.pieces) == 1 and chunk.pieces[0][0] == holders.position:
        return pieces[kind, chunk.name, chunk.start].cpu()
    values = torch.empty(chunk.size)
    for rank, start, size in chunk.pieces:
        target = values[start - chunk.start : start - chunk.start + size]
        if rank == holders.position:
            target.copy_(pieces[kind, chunk.name, start])
        else:
            dist.recv(target, holders.ranks[rank], group=holders.group)
    return values


def _write(
    holders: Holders, kind: str, chunk: Chunk, values: Tensor, writer: CheckpointWriter
) -> CheckpointError | None:
    where = holders.placements[chunk.name]
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
        return error
    return None
