"""What a sample holds (docs/data.md, "Sequences"): tokens, labels, positions of one row of S tokens."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.reference.data_order import permutation, words
from tests.reference.files import Corpus

NO_LOSS = -100
_CHUNK, _GROUP = 1024, 8  # documents packed together; chunks whose rows are mixed


@dataclass(frozen=True)
class Row:
    """Four lists of S numbers; ``positions`` restart where a document does; ``real``: 1, in padding 0."""

    tokens: list[int]
    labels: list[int]
    positions: list[int]
    real: list[int]


class Source:
    """A data set, sample by sample: ``shuffled(n)`` for training, ``ordered(n)`` for evaluation.

    ``name``: of the source; it takes part in the order.
    """

    def __init__(self, corpus: Corpus, name: str, data: dict[str, Any]):
        self.corpus, self.length, self.kind = corpus, data["seq_len"], data["sequences"]
        self.key = f"{data['seed']} {name} {corpus.digest}"
        own = data["eod_loss"]
        self._eod_loss = self.kind == "concatenate" if own is None else own
        self.whole_documents = self.kind in ("pack_documents", "one_document")
        self._order = functools.cache(permutation)
        self._rows = self._all_rows() if self.whole_documents else []
        if self.whole_documents:
            self.num_samples = sum(map(len, self._rows))
            self.num_ordered = self.num_samples
        else:
            self.num_samples = (len(corpus.stream) - 1) // self.length
            self.num_ordered = -(-(len(corpus.stream) - 1) // self.length)

    def shuffled(self, number: int) -> Row:
        epoch, inside = divmod(number, self.num_samples)
        if self.whole_documents:
            return self._packed(self._mixed_rows(epoch)[inside])
        window = self._order(f"{self.key} {epoch}", self.num_samples)[inside]
        shift = words(f"number shift {self.key} {epoch}", 1)[0] % self.length
        stream = self.corpus.stream
        return self._window(
            [int(stream[(window * self.length + shift + i) % len(stream)]) for i in range(self.length + 1)]
        )

    def ordered(self, number: int) -> Row:
        if self.whole_documents:
            rows = [row for chunk in self._rows for row in chunk]
            return self._packed(rows[number] if number < len(rows) else [])
        begin = number * self.length
        return self._window(self.corpus.stream[begin : begin + self.length + 1].tolist())

    def _window(self, raw: list[int]) -> Row:
        """``raw``: S + 1 tokens, fewer at the stream's end: what lies behind has no loss."""
        raw = raw + [None] * (self.length + 1 - len(raw))  # type: ignore[list-item]
        labels, positions, place = [], [], 0
        for token, following in itertools.pairwise(raw):
            positions.append(place)
            ends = token == self.corpus.eod
            place = 0 if ends else place + 1
            labels.append(NO_LOSS if following is None or (ends and not self._eod_loss) else following)
        return Row([token or 0 for token in raw[:-1]], labels, positions, [1] * self.length)

    def _packed(self, pieces: list[list[int]]) -> Row:
        """Pieces one after the other, each with the token behind it as its last label where the document goes on."""
        tokens, labels, positions = [], [], []
        for piece in pieces:
            inside = piece[: self.length] if len(piece) > self.length else piece
            following = piece[1 : len(inside) + 1]
            tokens += inside
            labels += following + [NO_LOSS] * (len(inside) - len(following))
            positions += range(len(inside))
        rest = self.length - len(tokens)
        real = [1] * len(tokens) + [0] * rest
        return Row(tokens + [self.corpus.eod] * rest, labels + [NO_LOSS] * rest, [*positions, *range(rest)], real)

    def _all_rows(self) -> list[list[list[list[int]]]]:
        """Rows of pieces of every chunk of documents. A piece that its document outlasts has one token more than S."""
        documents, at = [], 0
        for length in self.corpus.lengths:
            documents.append(self.corpus.stream[at : at + length].tolist())
            at += length
        chunks = []
        for first in range(0, len(documents), _CHUNK):
            pieces = [
                document[begin : begin + self.length + 1]
                for document in documents[first : first + _CHUNK]
                for begin in range(0, len(document), self.length)
            ]
            chunks.append(_best_fit(pieces, self.length) if self.kind == "pack_documents" else [[p] for p in pieces])
        return chunks

    def _mixed_rows(self, epoch: int) -> list[list[list[int]]]:
        order = self._order(f"chunks {self.key} {epoch}", len(self._rows))
        mixed = []
        for group in range(-(-len(order) // _GROUP)):
            rows = [row for chunk in order[group * _GROUP : (group + 1) * _GROUP] for row in self._rows[chunk]]
            mixed += [rows[i] for i in self._order(f"rows {self.key} {epoch} {group}", len(rows))]
        return mixed


def _best_fit(pieces: list[list[int]], capacity: int) -> list[list[list[int]]]:
    """Best-fit decreasing (Johnson 1974): the largest first, into the fullest row with room; of equally full ones into
    that which became so last."""
    size: Callable[[int], int] = lambda i: min(len(pieces[i]), capacity)  # noqa: E731
    rows: list[list[int]] = []
    room: list[int] = []
    since: list[int] = []
    for time, piece in enumerate(sorted(range(len(pieces)), key=lambda i: -size(i))):
        fitting = [row for row in range(len(rows)) if room[row] >= size(piece)]
        if fitting:
            row = min(fitting, key=lambda r: (room[r], -since[r]))
        else:
            row = len(rows)
            rows, room, since = [*rows, []], [*room, capacity], [*since, 0]
        rows[row].append(piece)
        room[row] -= size(piece)
        since[row] = time
    return [[pieces[i] for i in sorted(row)] for row in rows]


def tells_documents_apart(kind: str) -> bool:
    return kind in ("mask_documents", "pack_documents")


def as_arrays(rows: list[Row], length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Each of a row's lists [rows x S / length, length]: samples cut into shorter sequences."""
    tokens, labels, positions, real = (
        np.array([getattr(row, name) for row in rows]).reshape(-1, length)
        for name in ("tokens", "labels", "positions", "real")
    )
    begins = np.where(positions == 0, np.arange(length), 0)
    return tokens, labels, np.arange(length) - np.maximum.accumulate(begins, 1), real  # a cut starts anew, too
