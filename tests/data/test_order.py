"""The order is a bijection, looks random, and depends on nothing but its key and the number."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.data.feed.order import Epochs, Permutation


@settings(max_examples=60, deadline=None)
@given(key=st.text(), n=st.integers(1, 5000))
def test_a_permutation_is_a_bijection(key, n):
    images = Permutation(key, n)(np.arange(n))
    assert np.array_equal(np.sort(images), np.arange(n))
    assert [Permutation(key, n).inverse(image) for image in images[:5].tolist()] == list(range(min(n, 5)))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 2**62), key=st.text(), data=st.data())
def test_any_size_stays_inside_and_does_not_collide(n, key, data):
    indices = np.unique(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=50)))
    images = Permutation(key, n)(indices)
    assert images.min() >= 0
    assert images.max() < n
    assert len(np.unique(images)) == len(indices)


def test_the_key_changes_it():
    images = [Permutation(key, 1000)(np.arange(1000)) for key in ("", "1", "2", "1 0")]
    assert len({tuple(numbers) for numbers in images}) == 4


def test_every_place_is_equally_likely():
    n, seeds = 10, 1000
    counts = np.zeros((n, n))
    for seed in range(seeds):
        counts[np.arange(n), Permutation(str(seed), n)(np.arange(n))] += 1
    chi2 = ((counts - seeds / n) ** 2 / (seeds / n)).sum()
    assert 40 < chi2 < 140  # 81 degrees of freedom: mean 81, 4.6 standard deviations


def test_neighbours_land_far_apart():
    n = 100_000
    images = Permutation("1", n)(np.arange(n))
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(images, np.arange(n))[0, 1]) < 0.02


def test_indices_outside_are_refused():
    for index in (-1, 7):
        with pytest.raises(IndexError):
            Permutation("0", 7)(np.array([index]))


def test_each_epoch_has_its_own_order():
    epochs = Epochs("key", 100)
    numbers, images = epochs(np.arange(300))
    assert numbers.tolist() == [0] * 100 + [1] * 100 + [2] * 100
    orders = images.reshape(3, 100)
    assert (np.sort(orders, axis=1) == np.arange(100)).all()
    assert len({tuple(order) for order in orders.tolist()}) == 3
    shuffled = np.random.default_rng(0).permutation(300)
    assert np.array_equal(epochs(shuffled)[1], images[shuffled])


def test_the_order_is_pinned():
    """A change of these numbers changes the order of every run that is under way."""
    assert Permutation("1234", 1000)(np.arange(5)).tolist() == [528, 589, 634, 833, 64]
