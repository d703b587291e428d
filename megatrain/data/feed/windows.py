"""Samples that cut one long stream: windows of S tokens, whatever documents they hold.

The stream of T tokens has W = (T - 1) // S windows of S inputs and S labels (one token further). An epoch visits each
once. Shapes: n samples, S tokens of a sample.
"""

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatrain.data.errors import DataError
from megatrain.data.feed.order import Epochs, keyed_number
from megatrain.data.feed.rows import Rows
from megatrain.data.shards.reader import TokenDataset
from megatrain.spec.labels import IGNORE


@dataclass(frozen=True)
class Windows:
    """What shuffled and sequential windows share.

    ``seq_len``: S; ``eod_loss``: whether the label after an end of document, another document's first token, has loss.
    """

    dataset: TokenDataset
    seq_len: int
    eod_loss: bool

    def _finish(self, rows: Rows, own: slice | NDArray[np.int64], raw: NDArray[np.integer], starts: NDArray) -> None:
        """Tokens, labels and positions of the rows ``own`` from ``raw`` [n, S + 1]."""
        rows.tokens[own] = raw[:, :-1]
        rows.labels[own] = raw[:, 1:]
        if rows.positions is None and self.eod_loss:
            return
        if self.dataset.eod_id is not None:
            ends = np.flatnonzero(raw[:, :-1] == self.dataset.eod_id)
        else:  # the places before those where the index has a document begin
            begins = [self.dataset.document_begins(start, self.seq_len + 1)[1:] for start in starts.tolist()]
            ends = np.flatnonzero(np.array(begins))
        if not self.eod_loss:
            labels = rows.labels.reshape(-1)
            if isinstance(own, slice):
                labels[ends] = IGNORE
            else:
                row, col = np.divmod(ends, self.seq_len)
                labels[own[row] * self.seq_len + col] = IGNORE
        # what follows a row's last token begins the next row, as every row does
        rows.restart_positions(own, ends[ends < len(raw) * self.seq_len - 1] + 1, len(raw))


class ShuffledWindows(Windows):
    """Endless epochs, each in its own order and with its own shift of the windows on the stream, closed to a ring.

    Args:
        key: of the order; another one, another order.
    Raises:
        DataError: the stream is too short for one window.
    """

    def __init__(self, dataset: TokenDataset, seq_len: int, key: str, eod_loss: bool = True):
        super().__init__(dataset, seq_len, eod_loss)
        self.num_samples = (dataset.num_tokens - 1) // seq_len
        if self.num_samples < 1:
            raise DataError(
                f"{dataset.folder} has {dataset.num_tokens} tokens, a sample needs {seq_len + 1}: "
                "lower data.seq_len or add data"
            )
        self._key, self._epochs, self._buffer = key, Epochs(key, self.num_samples), _Buffer()

    def places(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """First tokens [n] of the samples [n]; a window may run over the stream's end."""
        epochs, windows = self._epochs(indices)
        kinds, inverse = np.unique(epochs, return_inverse=True)
        shifts = [keyed_number(f"shift {self._key} {epoch}", self.seq_len) for epoch in kinds.tolist()]
        return (windows * self.seq_len + np.array(shifts)[inverse]) % self.dataset.num_tokens

    def fill(self, places: NDArray[np.int64], rows: Rows, own: slice | NDArray[np.int64]) -> None:
        raw = self._buffer.of_shape(len(places), self.seq_len + 1, self.dataset.dtype)
        self.dataset.read(places, raw)
        self._finish(rows, own, raw, places)

    def spans(self, index: int) -> list[tuple[int, int]]:
        start = int(self.places(np.array([index]))[0])
        before_end = min(self.seq_len, self.dataset.num_tokens - start)
        return [(start, before_end), (0, self.seq_len - before_end)][: 1 + (before_end < self.seq_len)]

    def holding(self, begin: int, end: int, epoch: int) -> list[int]:
        ring, shift = self.dataset.num_tokens, keyed_number(f"shift {self._key} {epoch}", self.seq_len)
        tokens = {begin, *range(begin, end, self.seq_len), end - 1}  # one at least in each window between
        windows = {(token - shift) % ring // self.seq_len for token in tokens}
        return sorted(self._epochs.index_of(w, epoch) for w in windows if w < self.num_samples)


class SequentialWindows(Windows):
    """The stream from its start to its end, once; the last window may be short. Samples after it are empty.

    Args:
        tells_padding: whether batches say how long the short one is. Who looks back only need not know.
    """

    def __init__(self, dataset: TokenDataset, seq_len: int, eod_loss: bool = True, tells_padding: bool = False):
        super().__init__(dataset, seq_len, eod_loss)
        self._tells_padding = tells_padding
        self.num_samples = -(-(dataset.num_tokens - 1) // seq_len)

    def places(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """First tokens [n] of the samples [n]; the end of the stream for the empty ones after the last window."""
        return np.minimum(indices * self.seq_len, self.dataset.num_tokens)

    def fill(self, places: NDArray[np.int64], rows: Rows, own: slice | NDArray[np.int64]) -> None:
        raw = np.zeros((len(places), self.seq_len + 1), self.dataset.dtype)
        counts = np.minimum(self.seq_len + 1, self.dataset.num_tokens - places)
        for row, start, count in zip(raw, places.tolist(), counts.tolist(), strict=True):
            row[:count] = self.dataset.tokens(start, count)
        self._finish(rows, own, raw, np.minimum(places, self.dataset.num_tokens - 1))
        past_end = np.arange(1, self.seq_len + 1) >= counts[:, None]
        rows.labels[own] = np.where(past_end, IGNORE, rows.labels[own])
        if self._tells_padding and (counts < self.seq_len).any():
            rows.pad_from(own, np.minimum(counts, self.seq_len))

    def spans(self, index: int) -> list[tuple[int, int]]:
        start = index * self.seq_len
        return [(start, min(self.seq_len, self.dataset.num_tokens - start))] if index < self.num_samples else []

    def holding(self, begin: int, end: int, epoch: int) -> list[int]:
        if epoch:
            return []
        last = min((end - 1) // self.seq_len, self.num_samples - 1)  # the stream's last token may be only a label
        return list(range(begin // self.seq_len, last + 1))


class _Buffer(threading.local):
    """Memory that is read into again and again: each thread has its own."""

    raw: NDArray[np.integer] | None = None

    def of_shape(self, rows: int, cols: int, dtype: np.dtype) -> NDArray[np.integer]:
        if self.raw is None or self.raw.shape != (rows, cols):
            self.raw = np.empty((rows, cols), dtype)
        return self.raw
