"""Windows of the stream: each token once an epoch, where documents begin, and what has no loss."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.data.errors import DataError
from megatrain.data.feed.rows import Rows
from megatrain.data.feed.windows import SequentialWindows, ShuffledWindows
from megatrain.spec.labels import IGNORE
from tests.data.factory import EOD_ID, open_dataset


def stream(num_tokens):
    """A data set of which only the size matters."""
    return SimpleNamespace(num_tokens=num_tokens, folder="set", eod_id=0)


def test_each_epoch_visits_each_window_once_in_another_order():
    windows = ShuffledWindows(stream(1003), 10, "3")
    epochs = [windows.places(np.arange(100) + 100 * epoch) for epoch in range(4)]
    shifts = set()
    for starts in epochs:
        first = min(starts % 10, key=lambda shift: (starts % 10 == shift).sum())
        ordered = np.sort(starts)
        # on the ring of 1003 tokens all gaps are windows, but for the 3 tokens left over
        gaps = np.append(np.diff(ordered), ordered[0] + 1003 - ordered[-1])
        assert sorted(gaps) == [10] * 99 + [13]
        shifts.add(int(first))
    assert len({tuple(starts) for starts in epochs}) == 4
    assert len(shifts) > 1


def test_the_places_are_pinned():
    places = ShuffledWindows(stream(10_001), 10, "1234").places(np.array([0, 1, 999, 1000, 10**12]))
    assert places.tolist() == [6322, 6042, 6572, 8926, 975]


def test_a_far_sample_costs_no_more_than_a_near_one():
    windows = ShuffledWindows(stream(10**12), 1024, "0")
    begin = time.process_time()
    windows.places(np.arange(10**15, 10**15 + 100))
    assert time.process_time() - begin < 0.5  # takes 1 ms; anything stored or built would take hours


def test_sequential_covers_the_stream_once():
    for num_tokens in (2, 10, 11, 12, 21, 101):
        windows = SequentialWindows(stream(num_tokens), 10)
        starts = windows.places(np.arange(windows.num_samples))
        assert starts.tolist() == list(range(0, num_tokens - 1, 10))
        assert (windows.places(np.arange(1, 9) + windows.num_samples) == num_tokens).all()


def test_too_short_for_one_sample():
    with pytest.raises(DataError, match=r"10 tokens, a sample needs 11: lower data.seq_len"):
        ShuffledWindows(stream(10), 10, "0")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return open_dataset(tmp_path_factory.mktemp("windows") / "set", num_tokens=3000)


def filled(windows, places, cut=16):
    rows = Rows(len(places), 16, cut, documents=True, pin=False)
    windows.fill(np.array(places), rows, slice(None))
    return rows


@settings(max_examples=30, deadline=None)
@given(places=st.lists(st.integers(0, 2999), min_size=1, max_size=20), cut=st.sampled_from([16, 8, 4]))
def test_positions_restart_after_each_end_of_document(dataset, places, cut):
    ring = np.concatenate([dataset.tokens(0, 3000), dataset.tokens(0, 17)])
    rows = filled(ShuffledWindows(dataset, 16, "0", eod_loss=False), places, cut)
    for row, place in enumerate(places):
        window, position = ring[place : place + 17], 0
        assert rows.tokens[row].tolist() == window[:-1].tolist()
        for at in range(16):
            position = 0 if at % cut == 0 or window[at - 1] == EOD_ID else position + 1
            assert rows.positions[row, at] == position
            assert rows.labels[row, at] == (IGNORE if window[at] == EOD_ID else window[at + 1])


def test_documents_of_an_index_are_those_of_the_end_tokens(dataset):
    """Megatron's data sets don't say which token ends a document; their index does."""
    places = np.arange(0, 3000, 7)
    by_token = filled(ShuffledWindows(dataset, 16, "0", eod_loss=False), places)
    eod_id, dataset.eod_id = dataset.eod_id, None
    try:
        by_index = filled(ShuffledWindows(dataset, 16, "0", eod_loss=False), places)
    finally:
        dataset.eod_id = eod_id
    assert np.array_equal(by_token.positions, by_index.positions)
    assert np.array_equal(by_token.labels, by_index.labels)
