"""Shards read from begin to end, in blocks of whole documents."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatrain.data.shards.format import Index, read_index

_BLOCK_TOKENS = 1 << 20


class Block(NamedTuple):
    """Whole documents: their token ids [tokens], and ``lengths`` [documents]."""

    ids: NDArray[np.integer]
    lengths: NDArray[np.int64]


def document_lengths(index: Index) -> NDArray[np.int64]:
    """Tokens of each document [documents]."""
    sequence_ends = np.concatenate([[0], np.cumsum(index.lengths(), dtype=np.int64)])
    return np.diff(sequence_ends[index.document_marks()])


def read_blocks(stem: Path) -> Iterator[Block]:
    """All documents of ``stem``.bin and .idx, about a million tokens at a time.

    Raises:
        DataError: the index can't be read.
    """
    index = read_index(stem.with_name(f"{stem.name}.idx"))
    lengths = document_lengths(index)
    ends = np.cumsum(lengths)
    done = tokens = 0
    with open(stem.with_name(f"{stem.name}.bin"), "rb") as file:
        while done < len(lengths):
            following = max(int(np.searchsorted(ends, tokens + _BLOCK_TOKENS, side="right")), done + 1)
            end = int(ends[following - 1])
            ids = np.fromfile(file, index.dtype, end - tokens)
            yield Block(ids, lengths[done:following])
            done, tokens = following, end
