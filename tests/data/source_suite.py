"""The cases of every source of samples: a new one gets its proofs by a class that says how it is made.

Shapes: n samples, S tokens of a sample.
"""

from collections import Counter
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from megatrain.data.feed.rows import Rows, Samples
from megatrain.data.shards.reader import TokenDataset
from megatrain.spec.labels import IGNORE
from tests.data.factory import EOD_ID, write_documents

SEQ, NUM_TOKENS = 16, 1009  # whole windows, and one more label


class SourceSuite:
    """``endless``: there is another epoch after each, in another order; else samples after the last are empty.

    ``left_over``: the most tokens of the stream that an epoch may leave out of its inputs.
    """

    endless: ClassVar[bool] = True
    left_over: ClassVar[int] = 0

    @classmethod
    def source(cls, dataset: TokenDataset, key: str) -> Samples:
        """Samples of ``SEQ`` tokens, where documents are told apart and another document's first token has no loss."""
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def dataset(cls, tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
        """Documents of 1 to 50 tokens in several shards; all tokens differ, but for the ends of documents."""
        return TokenDataset.open(numbered_documents(tmp_path_factory.mktemp("source") / "set"))

    def filled(self, source: Samples, indices: list[int], cut: int = SEQ) -> Rows:
        rows = Rows(len(indices), SEQ, cut, documents=True, pin=False)
        source.fill(source.places(np.array(indices)), rows, slice(None))
        return rows

    def epoch(self, source: Samples, number: int = 0) -> Rows:
        return self.filled(source, list(range(number * source.num_samples, (number + 1) * source.num_samples)))

    def test_an_epoch_has_each_token_once(self, dataset: TokenDataset) -> None:
        source = self.source(dataset, "key")
        whole = Counter(dataset.tokens(0, dataset.num_tokens).tolist())
        for number in (0, 3) if self.endless else (0,):
            rows = self.epoch(source, number)
            read = Counter(rows.tokens[is_real(rows)].tolist())
            assert not read - whole, "given twice"
            assert (whole - read).total() <= self.left_over

    def test_a_label_is_the_next_token_of_the_document(self, dataset: TokenDataset) -> None:
        stream = dataset.tokens(0, dataset.num_tokens)
        following = {(int(a), int(b)) for a, b in zip(stream, np.roll(stream, -1), strict=True) if a != EOD_ID}
        rows = self.epoch(self.source(dataset, "key"))
        scored = rows.labels != IGNORE
        assert scored.sum() > 0.8 * dataset.num_tokens
        found = list(zip(rows.tokens[scored].tolist(), rows.labels[scored].tolist(), strict=True))
        assert set(found) <= following
        assert len(set(found)) == len(found), "scored twice"
        inside = is_real(rows) & (rows.tokens != EOD_ID)
        assert (scored == inside).all(), "each token of a document but its last has a next one, also across a cut"

    def test_positions_count_from_the_begin_of_each_document(self, dataset: TokenDataset) -> None:
        for cut in (SEQ, SEQ // 2):
            rows = self.filled(self.source(dataset, "key"), list(range(20)), cut)
            assert rows.positions is not None
            for tokens, positions, real in zip(rows.tokens, rows.positions, is_real(rows), strict=True):
                expected = 0
                for at in range(SEQ):
                    starts = at % cut == 0 or (tokens[at - 1] == EOD_ID and real[at - 1])
                    expected = 0 if starts else expected + 1
                    if real[at] or starts:
                        assert positions[at] == expected

    def test_samples_are_the_same_one_by_one_and_in_any_rows(self, dataset: TokenDataset) -> None:
        source, indices = self.source(dataset, "key"), [5, 0, 7, 2]
        together = self.filled(source, indices)
        scattered = Rows(6, SEQ, SEQ, documents=True, pin=False)
        own = np.array([4, 1, 0, 5])
        self.source(dataset, "key").fill(source.places(np.array(indices)), scattered, own)
        for at, index in enumerate(indices):
            alone = self.filled(self.source(dataset, "key"), [index])
            for name in ("tokens", "labels", "positions"):
                assert (getattr(alone, name)[0] == getattr(together, name)[at]).all(), name
                assert (getattr(alone, name)[0] == getattr(scattered, name)[own[at]]).all(), name

    def test_spans_say_what_a_sample_reads_and_holding_who_reads_it(self, dataset: TokenDataset) -> None:
        source = self.source(dataset, "key")
        epoch = 2 if self.endless else 0
        first = epoch * source.num_samples
        rows, readers = self.epoch(source, epoch), {}
        for row in range(source.num_samples):
            spans = source.spans(first + row)
            read = np.concatenate([dataset.tokens(begin, count) for begin, count in spans])
            assert read.tolist() == rows.tokens[row][is_real(rows)[row]].tolist()
            readers |= {token: first + row for begin, count in spans for token in range(begin, begin + count)}
        for number in range(dataset.num_documents):
            begin, end = bounds(dataset, number)
            holding = {readers[token] for token in range(begin, end) if token in readers}
            assert source.holding(begin, end, epoch) == sorted(holding)

    def test_the_order_is_the_keys(self, dataset: TokenDataset) -> None:
        once, again = self.source(dataset, "key"), self.source(dataset, "key")
        indices = np.arange(once.num_samples)
        assert (once.places(indices) == again.places(indices)).all()
        if self.endless:
            assert (once.places(indices) != self.source(dataset, "another").places(indices)).any()
            assert (once.places(indices) != once.places(indices + once.num_samples)).any(), "each epoch has its own"
        else:
            rows = self.filled(once, [once.num_samples, once.num_samples + 7])
            assert (rows.labels == IGNORE).all(), "nothing comes after the last"


def numbered_documents(folder: Path) -> Path:
    """A data set of documents of 1 to 50 tokens, ``NUM_TOKENS`` in all."""
    random, documents, used = np.random.default_rng(0), [], 0
    while used < NUM_TOKENS:
        length = min(int(random.integers(1, 51)), NUM_TOKENS - used)
        documents.append(np.append(np.arange(used + 1, used + length), EOD_ID))
        used += length
    return write_documents(folder, documents, NUM_TOKENS + 1, shard_tokens=300)


def bounds(dataset: TokenDataset, number: int) -> tuple[int, int]:
    """First token of a document, and the one after its last."""
    lengths = dataset.document_lengths(0, number + 1)
    return int(lengths[:-1].sum()), int(lengths.sum())


def is_real(rows: Rows) -> np.ndarray:
    """[n, S]: whether a place is none of padding."""
    lengths = rows.lengths(0, len(rows.tokens) * SEQ // rows.cut)
    if lengths is None:
        return np.ones_like(rows.tokens, dtype=bool)
    return (np.arange(rows.cut) < lengths.numpy()[:, None]).reshape(rows.tokens.shape)
