"""Blends: exact shares at every block edge, nothing lost or repeated, whatever happens to the weights."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.data.errors import DataError
from megatrain.data.feed.blend import Blend, Segment, planned_segments

NAMES = ["a", "b", "c", "d"]
weights_of_some = st.lists(st.fractions(0, 10, max_denominator=50), min_size=2, max_size=4).filter(
    lambda weights: any(weights) and all(w == 0 or w >= sum(weights) / 500 for w in weights)
)


def blend_of(changes, caps=None, start=0, counts=None):
    changes = [(first, [Fraction(weight) for weight in weights]) for first, weights in changes]
    sources = len(changes[0][1])
    segments, end = planned_segments(changes, caps or [None] * sources, NAMES[:sources], start, counts)
    return Blend(segments, "key", end)


def require_in_order(sources, indices, counts):
    """Each source's samples come one after the other, from ``counts`` on."""
    for source, first in enumerate(counts):
        own = indices[sources == source]
        assert own.tolist() == list(range(first, first + len(own)))


@settings(max_examples=60, deadline=None)
@given(weights=weights_of_some, samples=st.integers(1, 5000))
def test_shares_are_exact_to_one_sample_and_none_is_lost(weights, samples):
    blend = blend_of([(0, weights)])
    sources, indices = blend(np.arange(samples))
    require_in_order(sources, indices, [0] * len(weights))
    assert blend.counts(samples) == np.bincount(sources, minlength=len(weights)).tolist()
    size = blend.segments[0].block_size
    for edge in range(size, samples, size):
        for count, weight in zip(blend.counts(edge), weights, strict=True):
            assert abs(count - weight / sum(weights) * edge) < 1


@settings(max_examples=60, deadline=None)
@given(data=st.data(), weights=weights_of_some)
def test_weights_that_change_lose_and_repeat_nothing(data, weights):
    others = st.lists(st.sampled_from([0, 1, 2, 5]), min_size=len(weights), max_size=len(weights)).filter(any)
    changes = [(0, weights)]
    for _ in range(data.draw(st.integers(1, 3))):
        changes.append((changes[-1][0] + data.draw(st.integers(1, 3000)), data.draw(others)))
    blend = blend_of(changes)
    sources, indices = blend(np.arange(changes[-1][0] + 2000))
    require_in_order(sources, indices, [0] * len(weights))
    for (first, own), (end, _) in zip(changes, [*changes[1:], (changes[-1][0] + 1024, None)], strict=True):
        before, after = np.array(blend.counts(first)), np.array(blend.counts(end))
        exact = np.array([float(weight / sum(own)) * (end - first) for weight in map(Fraction, own)])
        if first != changes[-1][0] or blend.segments[-1].block_size == 1024:  # the end of a block
            assert (np.abs(after - before - exact) < 1).all()


@settings(max_examples=40, deadline=None)
@given(weights=weights_of_some, stop=st.integers(0, 4000), new=st.lists(st.integers(1, 9), min_size=4, max_size=4))
def test_a_change_in_the_middle_of_a_run_goes_on_where_it_was(weights, stop, new):
    old = blend_of([(0, weights)])
    counts = old.counts(stop)
    changed = blend_of([(0, new[: len(weights)])], start=stop, counts=counts)
    joined = Blend([*(s for s in old.segments if s.start < stop), *changed.segments], "key")
    sources, indices = joined(np.arange(stop + 1500))
    require_in_order(sources, indices, [0] * len(weights))
    before, _ = old(np.arange(stop))
    assert np.array_equal(sources[:stop], before)
    assert joined.counts(stop) == counts


@settings(max_examples=60, deadline=None)
@given(weights=weights_of_some, caps=st.lists(st.integers(1, 3000), min_size=4, max_size=4))
def test_caps_are_reached_exactly_and_end_the_blend(weights, caps):
    caps = caps[: len(weights)]
    blend = blend_of([(0, weights)], caps)
    expected = [cap if weight else 0 for cap, weight in zip(caps, weights, strict=True)]
    assert blend.num_samples == sum(expected)
    sources, indices = blend(np.arange(blend.num_samples))
    require_in_order(sources, indices, [0] * len(weights))
    assert np.bincount(sources, minlength=len(weights)).tolist() == expected
    assert blend.counts(blend.num_samples) == expected


def test_a_cap_gives_the_rest_to_the_others():
    blend = blend_of([(0, [1, 1, 2])], [500, None, None])
    assert blend.num_samples is None
    first, second = blend.segments
    assert abs(second.start - 2000) <= 4 and second.weights[0] == 0 and second.counts[0] == 500
    counts = np.array(blend.counts(second.start + 3072)) - blend.counts(second.start)
    assert counts.tolist() == [0, 1024, 2048]
    assert first.length == second.start


def test_any_sample_at_once_in_any_order():
    blend = blend_of([(0, ["0.3", "0.7"]), (10**9, ["1", "2"])])
    ids = np.array([10**12, 5, 10**9 - 1, 10**9, 3 * 10**12])
    sources, indices = blend(ids)
    for i, sample in enumerate(ids.tolist()):
        one = blend(np.array([sample]))
        assert (one[0][0], one[1][0]) == (sources[i], indices[i])
        assert indices[i] == blend.counts(sample)[sources[i]]
        assert blend.sample_of(int(sources[i]), int(indices[i])) == sample


def test_a_tiny_share_is_exact_or_refused():
    blend = blend_of([(0, [1, 100_000])])
    size = blend.segments[0].block_size
    assert size == 1 << 18
    sources, indices = blend(np.arange(2 * size))
    require_in_order(sources, indices, [0, 0])
    assert abs(int((sources == 0).sum()) - 2 * size / 100_001) < 1
    with pytest.raises(DataError, match=r"weight of data.train.a is 1.0e-06 of all: too small"):
        blend_of([(0, [1, 1_000_000])])


def test_one_source_is_handed_through():
    sources, indices = blend_of([(0, [3])])(np.arange(5) + 10**12)
    assert sources.tolist() == [0] * 5 and indices.tolist() == list(range(10**12, 10**12 + 5))


def test_the_blend_is_pinned():
    """A change of these numbers changes the order of every run that is under way."""
    sources, indices = Blend([Segment(0, (1, 2), (0, 0))], "1234")(np.array([0, 1, 2, 3, 4, 5000]))
    assert sources.tolist() == [0, 1, 0, 0, 1, 0] and indices.tolist() == [0, 0, 1, 2, 1, 1669]
