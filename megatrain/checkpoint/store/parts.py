"""Chunks that ranks read in parts: the CRCs of all parts, put together, are the chunk's.

So a rank reads of such a chunk only what it keeps, and each byte of it was still checked before the load succeeds.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass

import numpy as np
import numpy.typing as npt
from awscrt.checksums import combine_crc32c

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ReadPart:
    """Bytes ``[start, start + size)`` of a chunk of ``num_bytes``, as one rank read them, and their CRC-32C.

    ``chunk``: a digest of its place; ``wanted``: the CRC of all of it, as this rank's manifest has it.
    """

    chunk: int
    wanted: int
    num_bytes: int
    start: int
    size: int
    crc: int


def digest(place: str) -> int:
    """64 bits that tell the places of chunks apart. Were two alike, their parts would not fit: nothing is proved."""
    return int.from_bytes(hashlib.blake2b(place.encode(), digest_size=8).digest(), "little", signed=True)


def rows_of(parts: Sequence[ReadPart]) -> Rows:
    """[parts, 6], to be told to other ranks."""
    return np.array([astuple(part) for part in parts], np.int64).reshape(-1, 6)


def unproved(own: Iterable[ReadPart], told: Sequence[Rows]) -> set[int]:
    """The chunks of ``own`` parts of which ``told``, the parts of all ranks, give no proof.

    A chunk is proved if the different parts of it that were read lie side by side from its first byte to its last,
    and their CRCs together are the one that every reader's manifest has.
    """
    chunks = {part.chunk for part in own}
    rows = np.unique(np.concatenate(told), axis=0)
    found: dict[int, list[ReadPart]] = {}
    for row in rows[np.isin(rows[:, 0], list(chunks))].tolist():
        found.setdefault(row[0], []).append(ReadPart(*row))
    return {chunk for chunk in chunks if not _is_whole(found.get(chunk, []))}


def _is_whole(parts: list[ReadPart]) -> bool:
    if len({(part.wanted, part.num_bytes) for part in parts}) != 1:
        return False
    end = crc = 0
    for part in sorted(parts, key=lambda part: part.start):
        if part.start != end:
            return False
        crc = combine_crc32c(crc, part.crc, part.size) if end else part.crc
        end += part.size
    return end == parts[0].num_bytes and crc == parts[0].wanted
