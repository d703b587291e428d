"""Samples that cut no document which fits: packed by best fit, or one to a sequence, the rest padding.

Documents longer than S are cut into pieces of S tokens and a last one. Packing looks at one chunk of documents at a
time, so that a sample is found without an index of all: only the number of rows of each chunk is kept.
Shapes: n samples, S tokens of a sample.
"""

import functools
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatrain.data.feed.order import Epochs, Permutation
from megatrain.data.feed.rows import Rows
from megatrain.data.shards.reader import TokenDataset
from megatrain.spec.labels import IGNORE

_CHUNK = 1024  # documents that are packed together
_GROUP = 8  # chunks whose rows are mixed


class Pieces(NamedTuple):
    """Rows of a chunk: row r holds the pieces ``bounds[r]`` to ``bounds[r + 1] - 1``.

    ``starts``, ``lengths``: tokens of the stream; ``goes_on``: whether the document does, in another piece.
    """

    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    goes_on: NDArray[np.bool_]
    bounds: NDArray[np.int64]


class DocumentRows:
    """The rows of a data set, in the order of its documents.

    ``num_rows``: of all; ``row_ends``: numbers of the first rows after each chunk. Counting them takes about a second
    for a million documents where they are packed, and next to nothing where they are not.

    Args:
        pack: best fit, or one document to a row.
    Raises:
        DataError: an index is damaged.
    """

    def __init__(self, dataset: TokenDataset, seq_len: int, pack: bool):
        self.dataset, self.seq_len, self._pack = dataset, seq_len, pack
        num_chunks = -(-dataset.num_documents // _CHUNK)
        self._chunk_starts, counts = np.zeros(num_chunks, np.int64), np.zeros(num_chunks, np.int64)
        start = 0
        for chunk in range(num_chunks):
            lengths = self._lengths(chunk)
            self._chunk_starts[chunk] = start
            start += int(lengths.sum())
            counts[chunk] = (
                best_fit(_pieces(lengths, seq_len)[1], seq_len)[1] if pack else _num_pieces(lengths, seq_len).sum()
            )
        self.row_counts, self.row_ends = counts, np.cumsum(counts)
        self.num_rows = int(self.row_ends[-1])
        self._chunk = functools.lru_cache(4 * _GROUP)(self._made_chunk)

    def fill(self, numbers: NDArray[np.int64], rows: Rows, own: slice | NDArray[np.int64]) -> None:
        """Puts the rows ``numbers`` [n] into the rows ``own`` of a batch; from ``num_rows`` on they are empty."""
        shape = len(numbers), self.seq_len
        tokens, labels = np.full(shape, self.dataset.eod_id or 0, np.int64), np.full(shape, IGNORE, np.int64)
        begins, lengths = [], np.empty(len(numbers), np.int64)
        for row, number in enumerate(numbers.tolist()):
            at = 0
            for start, length, goes_on in self._row(number):
                found = self.dataset.tokens(start, length + goes_on)
                tokens[row, at : at + length] = found[:length]
                labels[row, at : at + len(found) - 1] = found[1:]
                begins.append(row * self.seq_len + at)
                at += length
            if at < self.seq_len:
                begins.append(row * self.seq_len + at)  # padding sees only itself
            lengths[row] = at
        rows.tokens[own], rows.labels[own] = tokens, labels
        rows.restart_positions(own, np.array(begins), len(numbers))
        rows.pad_from(own, lengths)

    def spans(self, number: int) -> list[tuple[int, int]]:
        """(first token, tokens) of each piece of a row."""
        return [(start, length) for start, length, _ in self._row(number)]

    def holding(self, begin: int, end: int) -> list[int]:
        """Numbers of the rows that have any of the tokens ``begin`` to ``end - 1``, of one document."""
        chunk = int(np.searchsorted(self._chunk_starts, begin, side="right")) - 1
        pieces = self._chunk(chunk)
        own = np.flatnonzero((pieces.starts < end) & (pieces.starts + pieces.lengths > begin))
        first = int(self.row_ends[chunk] - self.row_counts[chunk])
        return sorted({first + int(row) - 1 for row in np.searchsorted(pieces.bounds, own, side="right")})

    def _row(self, number: int) -> list[tuple[int, int, bool]]:
        """(first token, tokens, whether the document goes on) of each piece of a row."""
        if number >= self.num_rows:
            return []
        chunk = int(np.searchsorted(self.row_ends, number, side="right"))
        pieces = self._chunk(chunk)
        inside = number - int(self.row_ends[chunk] - self.row_counts[chunk])
        own = slice(int(pieces.bounds[inside]), int(pieces.bounds[inside + 1]))
        columns = pieces.starts[own].tolist(), pieces.lengths[own].tolist(), pieces.goes_on[own].tolist()
        return list(zip(*columns, strict=True))

    def _lengths(self, chunk: int) -> NDArray[np.int64]:
        first = chunk * _CHUNK
        return self.dataset.document_lengths(first, min(first + _CHUNK, self.dataset.num_documents)).astype(np.int64)

    def _made_chunk(self, chunk: int) -> Pieces:
        starts, lengths, goes_on = _pieces(self._lengths(chunk), self.seq_len)
        starts = starts + self._chunk_starts[chunk]
        if not self._pack:
            return Pieces(starts, lengths, goes_on, np.arange(len(starts) + 1))
        row_of, num_rows = best_fit(lengths, self.seq_len)
        by_row = np.argsort(row_of, kind="stable")
        bounds = np.searchsorted(row_of[by_row], np.arange(num_rows + 1))
        return Pieces(starts[by_row], lengths[by_row], goes_on[by_row], bounds)


class ShuffledDocuments:
    """Endless epochs of rows: the chunks in an order of each epoch's own, and mixed within groups of chunks.

    Args:
        key: of the order; another one, another order.
    """

    def __init__(self, rows: DocumentRows, key: str):
        self._rows, self._key, self.num_samples = rows, key, rows.num_rows
        self._chunks = Epochs(f"chunks {key}", len(rows.row_counts))
        self._layout = functools.lru_cache(2)(self._epoch_layout)
        self._mixed = functools.lru_cache(8)(self._mixed_group)

    def places(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers [n] of the rows that are the samples [n]."""
        places = np.empty_like(indices)
        for i, index in enumerate(indices.tolist()):
            epoch, inside = divmod(index, self.num_samples)
            _, ends = self._layout(epoch)
            group = int(np.searchsorted(ends[_GROUP - 1 :: _GROUP], inside, side="right"))
            first = int(ends[group * _GROUP - 1]) if group else 0
            places[i] = self._mixed(epoch, group)[inside - first]
        return places

    def fill(self, places: NDArray[np.int64], rows: Rows, own: slice | NDArray[np.int64]) -> None:
        self._rows.fill(places, rows, own)

    def spans(self, index: int) -> list[tuple[int, int]]:
        return self._rows.spans(int(self.places(np.array([index]))[0]))

    def holding(self, begin: int, end: int, epoch: int) -> list[int]:
        chunks, ends = self._layout(epoch)
        indices = []
        for number in self._rows.holding(begin, end):
            chunk = int(np.searchsorted(self._rows.row_ends, number, side="right"))
            group = int(np.flatnonzero(chunks == chunk)[0]) // _GROUP
            first = int(ends[group * _GROUP - 1]) if group else 0
            indices.append(
                epoch * self.num_samples + first + int(np.flatnonzero(self._mixed(epoch, group) == number)[0])
            )
        return sorted(indices)

    def _epoch_layout(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The chunks in the epoch's order, and how many rows there are up to each one's end."""
        count = len(self._rows.row_counts)
        _, chunks = self._chunks(np.arange(count) + epoch * count)
        return chunks, np.cumsum(self._rows.row_counts[chunks])

    def _mixed_group(self, epoch: int, group: int) -> NDArray[np.int64]:
        chunks, _ = self._layout(epoch)
        own = chunks[group * _GROUP : (group + 1) * _GROUP]
        ends, counts = self._rows.row_ends[own], self._rows.row_counts[own]
        numbers = np.concatenate([np.arange(end - count, end) for end, count in zip(ends, counts, strict=True)])
        return numbers[Permutation(f"rows {self._key} {epoch} {group}", len(numbers))(np.arange(len(numbers)))]


class SequentialDocuments:
    """The rows in their order, once; samples after them are empty."""

    def __init__(self, rows: DocumentRows):
        self._rows, self.num_samples = rows, rows.num_rows

    def places(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers [n] of the rows that are the samples [n]."""
        return np.minimum(indices, self.num_samples)

    def fill(self, places: NDArray[np.int64], rows: Rows, own: slice | NDArray[np.int64]) -> None:
        self._rows.fill(places, rows, own)

    def spans(self, index: int) -> list[tuple[int, int]]:
        return self._rows.spans(index)

    def holding(self, begin: int, end: int, epoch: int) -> list[int]:
        return [] if epoch else self._rows.holding(begin, end)


def best_fit(lengths: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], int]:
    """Best-fit decreasing (Johnson 1974): the row of each piece, and how many rows there are.

    The largest pieces first, each into the fullest row that has room. A bit for each free length that some row has
    finds that row in one step.
    """
    row_of, num_rows, free = np.empty(len(lengths), np.int64), 0, 0
    rows_with: list[list[int]] = [[] for _ in range(capacity + 1)]
    order = np.argsort(-lengths, kind="stable")
    for piece, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = free >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = rows_with[room].pop()
            if not rows_with[room]:
                free ^= 1 << room
        else:
            room, row, num_rows = capacity, num_rows, num_rows + 1
        row_of[piece] = row
        if left := room - length:
            rows_with[left].append(row)
            free |= 1 << left
    return row_of, num_rows


def _num_pieces(lengths: NDArray[np.int64], seq_len: int) -> NDArray[np.int64]:
    return -(-lengths // seq_len)


def _pieces(lengths: NDArray[np.int64], seq_len: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """First token (from the first document's), tokens, and whether the document goes on, of all pieces."""
    counts = _num_pieces(lengths, seq_len)
    document_starts = np.cumsum(lengths) - lengths
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    offsets = number * seq_len
    left = np.repeat(lengths, counts) - offsets
    return np.repeat(document_starts, counts) + offsets, np.minimum(left, seq_len), left > seq_len
