"""Rows of whole documents: nothing is lost or repeated, and no document that fits is cut."""

import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.data.feed.document_rows import DocumentRows, ShuffledDocuments, best_fit
from megatrain.data.feed.validation import num_batches, validation_loader
from megatrain.data.shards.reader import TokenDataset
from megatrain.spec.labels import IGNORE
from tests.data.factory import write_documents
from tests.data.reading import SEQ, make_sources, run_config, training_data


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=200))
def test_best_fit_fills_rows_and_wastes_little(lengths):
    row_of, num_rows = best_fit(np.array(lengths), 50)
    loads = np.bincount(row_of, weights=lengths, minlength=num_rows)
    assert loads.max() <= 50 and loads.min() > 0
    # at most one row is half empty: another like it would have gone in there
    assert (loads <= 25).sum() <= 1
    assert num_rows <= 11 / 9 * -(-sum(lengths) // 50) * 2 + 1


def numbered(lengths):
    """A data set whose tokens are all different, by their documents' lengths alone."""
    tokens = np.arange(sum(lengths)) + 1
    return SimpleNamespace(
        num_documents=len(lengths),
        eod_id=0,
        document_lengths=lambda first, end: np.array(lengths[first:end], np.int32),
        tokens=lambda start, count: tokens[start : start + count],
    )


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=3000),
    pack=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_an_epoch_has_every_token_once_and_cuts_no_document_that_fits(lengths, pack, epoch):
    from megatrain.data.feed.rows import Rows

    samples = ShuffledDocuments(DocumentRows(numbered(lengths), SEQ, pack), "key")
    rows = Rows(samples.num_samples, SEQ, SEQ, documents=True, pin=False)
    places = samples.places(np.arange(samples.num_samples) + epoch * samples.num_samples)
    assert sorted(places) == list(range(samples.num_samples))
    samples.fill(places, rows, slice(None))
    assert rows.lengths(0, samples.num_samples).tolist() == (rows.tokens > 0).sum(1).tolist()
    halves = Rows(samples.num_samples, SEQ, SEQ // 2, documents=False, pin=False)
    samples.fill(places[::-1], halves, np.arange(samples.num_samples)[::-1])
    filled = (rows.tokens.reshape(-1, SEQ // 2) > 0).sum(1)
    assert halves.lengths(1, len(filled) - 1).tolist() == filled[1:].tolist()
    read = rows.tokens[rows.tokens > 0]
    assert sorted(read.tolist()) == list(range(1, sum(lengths) + 1))
    starts = np.cumsum(lengths) - lengths + 1
    begins = set(rows.tokens[(rows.positions == 0) & (rows.tokens > 0)].tolist())
    assert begins == {int(s) + at for s, n in zip(starts, lengths, strict=True) for at in range(0, n, SEQ)}
    # every token but the first of each document is once the label of the one before it
    labels = rows.labels[rows.labels != IGNORE]
    assert sorted(labels.tolist()) == sorted(set(range(1, sum(lengths) + 1)) - set(starts.tolist()))
    assert (rows.labels == rows.tokens + 1)[rows.labels != IGNORE].all()
    for start, _ in samples.spans(epoch * samples.num_samples):
        document = int(np.searchsorted(starts - 1, start, side="right")) - 1
        first = int(starts[document]) - 1
        assert epoch * samples.num_samples in samples.holding(first, first + lengths[document], epoch)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return make_sources(tmp_path_factory.mktemp("sources"))


@pytest.mark.parametrize("sequences", ["pack_documents", "one_document"])
def test_ranks_share_batches_of_documents(sources, sequences):
    data = training_data(sources, sequences=sequences)
    for step in (0, 3, 10**6):
        whole, parts = data.loader(0, 1).batch(step), [data.loader(rank, 4).batch(step) for rank in range(4)]
        assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
        assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
    assert (whole.positions is None) == (sequences == "one_document")


@pytest.mark.parametrize("sequences", ["pack_documents", "one_document"])
def test_validation_reads_each_document_once(sources, sequences):
    dataset = TokenDataset.open(sources["c"]["path"])
    loader = validation_loader(dataset, run_config({}, {"global_batch_size": 4}, sequences=sequences), 0, 1)
    labels = [loader.batch(step).labels.flatten() for step in range(num_batches(loader) + 1)]
    assert (labels[-1] == IGNORE).all()
    firsts = Counter(int(dataset.document(number)[0]) for number in range(dataset.num_documents))
    scored = Counter(token for label in labels for token in label.tolist() if token != IGNORE)
    assert scored + firsts == Counter(dataset.tokens(0, dataset.num_tokens).tolist())


def test_counting_the_rows_of_many_documents_is_quick(tmp_path):
    lengths = np.random.default_rng(0).integers(1, 400, 100_000)
    begin = time.process_time()
    rows = DocumentRows(numbered(lengths.tolist()), 512, pack=True)
    assert time.process_time() - begin < 5  # takes 0.2 s
    assert rows.num_rows * 512 < 1.02 * lengths.sum(), "2 % of padding at most"


def test_a_document_longer_than_a_sequence_goes_on_in_the_next_row(tmp_path):
    folder = write_documents(tmp_path / "set", [np.append(np.arange(1, 40), 0)], 300)
    batch = training_data(str(folder), {"global_batch_size": 3}, sequences="one_document").loader(0, 1).batch(0)
    rows = sorted(map(tuple, batch.tokens.tolist()), key=lambda row: row[0])
    assert rows == [(*range(1, 17),), (*range(17, 33),), (*range(33, 40), 0, *[0] * 8)]
