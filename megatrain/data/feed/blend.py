"""Which source a global sample comes from, and which of that source's samples it is.

The run of samples is cut into *segments* of constant weights, and each segment into blocks. In a block of L samples
every source has its exact share, by rounding the cumulated shares at the block's edges, and a keyed bijection mixes
them. So any sample is found by looking at one block, and at every edge a source's count is within one of its share.
Within a source, samples are handed out in the order of their numbers: whatever comes next, none is lost or repeated.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from math import lcm

import numpy as np
from numpy.typing import NDArray

from megatrain.data.errors import DataError
from megatrain.data.feed.order import Permutation

_BLOCK, _MAX_BLOCK = 1 << 10, 1 << 20  # samples


@dataclass(frozen=True)
class Segment:
    """Samples from number ``start`` on.

    ``weights``: of the sources, relative to each other; ``counts``: samples of each source before ``start``;
    ``length``: samples that it was planned for (None: without end), which fixes its last block.
    """

    start: int
    weights: tuple[int, ...]
    counts: tuple[int, ...]
    length: int | None = None

    @functools.cached_property
    def block_size(self) -> int:
        """A power of two in which each source has at least two samples: then rounding takes none away again."""
        least = min(weight for weight in self.weights if weight)
        return max(_BLOCK, 1 << (-(-2 * sum(self.weights) // least) - 1).bit_length())

    def shares(self, samples: int) -> NDArray[np.int64]:
        """Samples of each source among the first ``samples`` of the segment, at an edge of a block."""
        total = sum(self.weights)
        cumulated = [(2 * part * samples + total) // (2 * total) for part in accumulate(self.weights)]
        return np.array([high - low for low, high in pairwise([0, *cumulated])], np.int64)

    def block_of(self, sample: int) -> tuple[int, int]:
        """(first, end) of the block of a sample, both counted in the segment. The last block takes in what is left."""
        size = self.block_size
        number = sample // size
        if self.length is None:
            return number * size, (number + 1) * size
        last = max(self.length // size - 1, 0)
        number = min(number, last)
        return number * size, self.length if number == last else (number + 1) * size


class Blend:
    """Segments one after the other, from sample 0 on.

    Args:
        key: of the mixing inside blocks.
        num_samples: samples until all sources have reached their caps; None: no end.
    """

    def __init__(self, segments: Sequence[Segment], key: str, num_samples: int | None = None):
        self.segments, self.num_samples, self._key = tuple(segments), num_samples, key
        self._starts = np.array([segment.start for segment in self.segments])
        self._block = functools.lru_cache(4)(self._made_block)

    def __call__(self, sample_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(number of the source, number in the source) of each sample [n]."""
        if self.num_samples is not None:  # whoever plans ahead may look past the end
            sample_ids = np.minimum(sample_ids, self.num_samples - 1)
        if len(self.segments) == 1 and len(self.segments[0].weights) == 1:
            return np.zeros_like(sample_ids), sample_ids.copy()
        sources, indices = np.empty_like(sample_ids), np.empty_like(sample_ids)
        at = np.searchsorted(self._starts, sample_ids, side="right") - 1
        done = np.zeros(len(sample_ids), bool)
        while not done.all():
            first = int(np.argmin(done))
            segment = int(at[first])
            begin, end = self.segments[segment].block_of(int(sample_ids[first]) - self.segments[segment].start)
            places = sample_ids - self.segments[segment].start
            own = (at == segment) & (places >= begin) & (places < end)
            block_sources, block_indices = self._block(segment, begin, end)
            sources[own], indices[own] = block_sources[places[own] - begin], block_indices[places[own] - begin]
            done |= own
        return sources, indices

    def sample_of(self, source: int, index: int) -> int:
        """The global sample that is sample ``index`` of ``source``: the one after which it has given index + 1."""
        low, high = -1, 1
        while self.counts(high)[source] <= index:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.counts(middle)[source] > index else (middle, high)
        return high - 1

    def counts(self, samples: int) -> list[int]:
        """Samples of each source among the first ``samples``."""
        at = int(np.searchsorted(self._starts, samples, side="right")) - 1
        segment = self.segments[at]
        inside = samples - segment.start
        begin, end = segment.block_of(max(inside - 1, 0))
        counts = np.array(segment.counts, np.int64) + segment.shares(begin)
        if inside > begin:
            sources, _ = self._block(at, begin, end)
            counts += np.bincount(sources[: inside - begin], minlength=len(counts))
        return [int(count) for count in counts]

    def _made_block(self, number: int, begin: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source and number in it of every sample of a block."""
        segment = self.segments[number]
        before = segment.shares(begin)
        shares = segment.shares(end) - before
        slots = Permutation(f"blend {self._key} {segment.start} {begin}", end - begin)(np.arange(end - begin))
        sources = np.repeat(np.arange(len(shares)), shares)[slots]
        by_source = np.argsort(sources, kind="stable")
        indices = np.empty_like(sources)
        indices[by_source] = np.arange(end - begin) - np.repeat(np.cumsum(shares) - shares, shares)
        return sources, indices + (np.array(segment.counts, np.int64) + before)[sources]


def planned_segments(
    changes: Sequence[tuple[int, Sequence[Fraction]]],
    caps: Sequence[int | None],
    names: Sequence[str],
    start: int = 0,
    counts: Sequence[int] | None = None,
) -> tuple[list[Segment], int | None]:
    """Segments from sample ``start`` on, and the number of the sample at which all sources are used up (None: never).

    Args:
        changes: (first sample, weights) in rising order, the first from 0 on.
        caps: samples that each source gives at most, in the whole run.
        counts: samples of each source before ``start``.
    Raises:
        DataError: a weight is too small to be kept exactly.
    """
    segments: list[Segment] = []
    now = list(counts or [0] * len(names))
    for number, (first, weights) in enumerate(changes):
        end = changes[number + 1][0] if number + 1 < len(changes) else None
        at = max(first, start)
        while end is None or at < end:
            open_ = [cap is None or count < cap for cap, count in zip(caps, now, strict=True)]
            left = [weight if is_open else Fraction(0) for weight, is_open in zip(weights, open_, strict=True)]
            if not any(left):
                return segments, at
            segment = Segment(at, _integers(left, names), tuple(now), None if end is None else end - at)
            segment = _until_a_cap(segment, caps)
            segments.append(segment)
            if segment.length is None:
                return segments, None
            now = [count + int(share) for count, share in zip(now, segment.shares(segment.length), strict=True)]
            at += segment.length
    return segments, None


def _integers(weights: Sequence[Fraction], names: Sequence[str]) -> tuple[int, ...]:
    unit = lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * unit) for weight in weights]
    for name, weight in zip(names, whole, strict=True):
        if weight and 2 * sum(whole) > _MAX_BLOCK * weight:
            raise DataError(
                f"the weight of data.train.{name} is {weight / sum(whole):.1e} of all: too small for an exact share. "
                f"Raise it to {2 / _MAX_BLOCK:.1e} or more, or set it to 0"
            )
    return tuple(whole)


def _until_a_cap(segment: Segment, caps: Sequence[int | None]) -> Segment:
    """The segment, ended where the first source reaches its cap exactly."""
    end, moved = segment.length, True
    while moved:  # an earlier end may give a source that was looked at before one sample more
        moved = False
        for source, cap in enumerate(caps):
            if cap is None or not segment.weights[source]:
                continue
            left = cap - segment.counts[source]
            if end is None or segment.shares(end)[source] > left:
                share = Fraction(segment.weights[source], sum(segment.weights))
                end = _first_with(segment, source, left, int((left + 1) / share) + 1 if end is None else end)
                moved = True
    return Segment(segment.start, segment.weights, segment.counts, end)


def _first_with(segment: Segment, source: int, wanted: int, high: int) -> int:
    """Samples up to ``high`` of which ``source`` has ``wanted``: its count moves by at most one a sample."""
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if segment.shares(middle)[source] < wanted else (low, middle)
    return high
