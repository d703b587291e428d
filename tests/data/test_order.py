"""The order is a bijection, looks random, and depends on nothing but seed and sample number."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.data.errors import DataError
from megatrain.data.order import Permutation, SequentialOrder, ShuffledOrder


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**70), n=st.integers(1, 5000), epoch=st.integers(0, 10**9))
def test_a_permutation_is_a_bijection(seed, n, epoch):
    images = Permutation(seed, n, epoch)(np.arange(n))
    assert np.array_equal(np.sort(images), np.arange(n))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 2**62), seed=st.integers(0, 9), data=st.data())
def test_any_size_stays_inside_and_does_not_collide(n, seed, data):
    indices = np.unique(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=50)))
    images = Permutation(seed, n)(indices)
    assert images.min() >= 0
    assert images.max() < n
    assert len(np.unique(images)) == len(indices)


def test_seed_and_epoch_change_it():
    images = [Permutation(*key)(np.arange(1000)) for key in ((1, 1000, 0), (2, 1000, 0), (1, 1000, 1))]
    assert len({tuple(numbers) for numbers in images}) == 3


def test_every_place_is_equally_likely():
    n, seeds = 10, 1000
    counts = np.zeros((n, n))
    for seed in range(seeds):
        counts[np.arange(n), Permutation(seed, n)(np.arange(n))] += 1
    chi2 = ((counts - seeds / n) ** 2 / (seeds / n)).sum()
    assert 40 < chi2 < 140  # 81 degrees of freedom: mean 81, 4.6 standard deviations


def test_neighbours_land_far_apart():
    n = 100_000
    images = Permutation(1, n)(np.arange(n))
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(images, np.arange(n))[0, 1]) < 0.02


def test_indices_outside_are_refused():
    for index in (-1, 7):
        with pytest.raises(IndexError):
            Permutation(0, 7)(np.array([index]))


def test_each_epoch_visits_each_window_once_in_another_order():
    order = ShuffledOrder(num_tokens=1003, seq_len=10, seed=3)
    epochs = [order.starts(np.arange(100) + 100 * epoch) for epoch in range(4)]
    shifts = set()
    for starts in epochs:
        first = min(starts % 10, key=lambda shift: (starts % 10 == shift).sum())
        windows = np.sort(starts)
        # on the ring of 1003 tokens all gaps are windows, but for the 3 tokens left over
        gaps = np.append(np.diff(windows), windows[0] + 1003 - windows[-1])
        assert sorted(gaps) == [10] * 99 + [13]
        shifts.add(int(first))
    assert len({tuple(starts) for starts in epochs}) == 4
    assert len(shifts) > 1


def test_the_order_is_pinned():
    """Whoever changes these numbers changes the data order of every run that resumes."""
    assert Permutation(1234, 1000)(np.arange(5)).tolist() == [632, 604, 24, 112, 85]
    order = ShuffledOrder(10_001, 10, 1234)
    assert order.starts(np.array([0, 1, 999, 1000, 10**12])).tolist() == [6320, 6040, 6570, 8923, 971]


def test_a_far_sample_costs_no_more_than_a_near_one():
    order = ShuffledOrder(10**12, 1024, 0)
    begin = time.process_time()
    order.starts(np.arange(10**15, 10**15 + 100))
    assert time.process_time() - begin < 0.5  # takes 1 ms; anything stored or built would take hours


def test_sequential_covers_the_stream_once():
    for num_tokens in (2, 10, 11, 12, 21, 101):
        order = SequentialOrder(num_tokens, 10)
        starts = order.starts(np.arange(order.num_windows))
        assert starts.tolist() == list(range(0, num_tokens - 1, 10))
        assert (order.starts(np.arange(1, 9) + order.num_windows) == num_tokens).all()


def test_too_short_for_one_sample():
    with pytest.raises(DataError, match=r"10 tokens, a sample needs 11: lower data.seq_len"):
        ShuffledOrder(10, 10, 0)
