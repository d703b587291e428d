"""Who writes what: cuts tensors into chunks and deals them out over the ranks that share them. Pure arithmetic.

Every rank of the group computes the same plan from the same numbers; ``Piece`` and ``Chunk`` count elements of a
tensor's flattened part (of one tensor-parallel rank).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

CHUNKS_PER_RANK = 4  # of a fair share: evens out the load without making many files
MIN_CHUNK_ELEMENTS = 2**18  # 1 MiB of FP32
FAIRNESS = 1.05  # of the mean, beyond which a rank is spared further chunks that it holds itself


@dataclass(frozen=True)
class LocalTensor:
    """A tensor's part on one tensor-parallel rank: ``rows`` x ``row_elements``; ``ranges``: what each rank holds of it.

    ``ranges`` maps the position of a rank in the group to ``(start, size)`` in elements. Ranges may overlap (without
    ZeRO each rank holds all); together they cover the part. ``even``: other tensor-parallel ranks hold further rows, so
    that only chunks of one height make a regular grid.
    """

    name: str
    rows: int
    row_elements: int
    ranges: Mapping[int, tuple[int, int]]
    even: bool = False


@dataclass(frozen=True)
class Chunk:
    """Elements ``[start, start + size)`` of ``name``, in rows from ``first_row`` on, cut at every ``chunk_rows``.

    The rank at position ``owner`` writes it; ``pieces`` are the (rank, start, size) that it is put together from.
    """

    name: str
    first_row: int
    chunk_rows: int
    start: int
    size: int
    owner: int
    pieces: tuple[tuple[int, int, int], ...]


@dataclass
class WriteRounds:
    """Chunks in rounds, in which each rank writes at most one chunk: what a rank needs from others comes in one go."""

    rounds: list[list[Chunk]] = field(default_factory=list)

    @property
    def chunks(self) -> list[Chunk]:
        return [chunk for round_ in self.rounds for chunk in round_]


def chunk_limit(parts: Sequence[LocalTensor], num_ranks: int) -> int:
    """Elements that a chunk should not exceed by much, the same for all ranks that hold parts of the same tensors."""
    return max(MIN_CHUNK_ELEMENTS, sum(part.rows * part.row_elements for part in parts) // num_ranks // CHUNKS_PER_RANK)


def deal_out(parts: Sequence[LocalTensor], num_ranks: int, limit: int) -> WriteRounds:
    """Each chunk goes to the rank that holds most of it, or to the least loaded where that one has its fair share."""
    fair_share = sum(part.rows * part.row_elements for part in parts) / num_ranks * FAIRNESS
    loads: list[int] = [0] * num_ranks
    queues: list[list[Chunk]] = [[] for _ in range(num_ranks)]
    cuts = [(part, row, rows) for part in parts for row, rows in _cut(part, limit)]
    for part, row, chunk_rows in sorted(cuts, key=lambda cut: -cut[2] * cut[0].row_elements):  # large ones first
        start, stop = row * part.row_elements, min(row + chunk_rows, part.rows) * part.row_elements
        held = {
            rank: share
            for rank, ranges in part.ranges.items()
            if (share := _overlap(start, stop, *ranges)) and loads[rank] + stop - start <= fair_share
        }
        ranks = held or dict.fromkeys(range(num_ranks), 0)
        owner = max(ranks, key=lambda rank: (ranks[rank], -loads[rank], -rank))
        loads[owner] += stop - start
        pieces = tuple(_pieces(start, stop, owner, part.ranges))
        queues[owner].append(Chunk(part.name, row, chunk_rows, start, stop - start, owner, pieces))
    length = max((len(queue) for queue in queues), default=0)
    return WriteRounds([[queue[i] for queue in queues if i < len(queue)] for i in range(length)])


def _cut(part: LocalTensor, limit: int) -> Iterable[tuple[int, int]]:
    """(first row, rows of a chunk) of each chunk: few enough rows to stay near ``limit`` elements."""
    wanted = min(part.rows, -(-part.rows * part.row_elements // limit))
    if part.even:
        wanted = next((n for n in range(wanted, min(2 * wanted, part.rows) + 1) if part.rows % n == 0), 1)
    rows = -(-part.rows // wanted)
    return ((row, rows) for row in range(0, part.rows, rows))


def _overlap(start: int, stop: int, begin: int, size: int) -> int:
    return max(0, min(stop, begin + size) - max(start, begin))


def _pieces(start: int, stop: int, owner: int, ranges: Mapping[int, tuple[int, int]]) -> Iterable[tuple[int, int, int]]:
    """Which rank gives what, each element once: the owner all that it holds, the others the rest."""
    gaps = [(start, stop)]
    for rank in sorted(ranges, key=lambda rank: (rank != owner, rank)):
        begin, end = ranges[rank][0], sum(ranges[rank])
        rest = []
        for low, high in gaps:
            first, last = max(low, begin), min(high, end)
            if first >= last:
                rest.append((low, high))
                continue
            yield rank, first, last - first
            rest += [(a, b) for a, b in ((low, first), (last, high)) if a < b]
        gaps = rest
    assert not gaps, "the ranges of the ranks do not cover the part"
