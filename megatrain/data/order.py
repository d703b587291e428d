"""Which window of the token stream a global sample number stands for. Nothing is stored: O(1) for any sample.

The stream of T tokens holds W = (T - 1) // S windows of S inputs and S labels (one token further). An epoch visits
each window once. Sample n is the (n mod W)-th of epoch n // W, whatever the batch size, the ranks or the run's length.
"""

import hashlib
import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatrain.data.errors import DataError

_ROUNDS = 8  # with 6, some permutations of a handful of windows are visibly likelier than others


class Permutation:
    """A keyed bijection on [0, n).

    A Feistel network on pairs (left, right) with n <= left_size * right_size: each round adds to one half a keyed hash
    of the other, which can be undone, so the whole is a bijection on the pairs. A result that is no number below
    n is sent through again ("cycle walking") until it is one: the cycle that it lies on began below n.

    Args:
        seed: the key; any integer.
        n: size of the domain, 1 to 2^62.
        epoch: another key for each epoch.
    """

    def __init__(self, seed: int, n: int, epoch: int = 0):
        if not 1 <= n <= 1 << 62:
            raise ValueError(f"a permutation of {n} numbers")
        self.n = n
        # nearly square and barely larger than n, so that few results need a second walk
        self._left_size = np.uint64(math.isqrt(n - 1) + 1)
        self._right_size = np.uint64(-(-n // int(self._left_size)))
        self._keys = _keyed_words(f"order {seed} {epoch}", _ROUNDS)

    def __call__(self, indices: NDArray[np.integer]) -> NDArray[np.int64]:
        """Images [...] of ``indices`` [...], each in [0, n)."""
        indices = np.asarray(indices)
        if indices.size and (indices.min() < 0 or indices.max() >= self.n):
            raise IndexError(f"indices outside of [0, {self.n})")
        images = self._walk(indices.astype(np.uint64).ravel())
        while (outside := np.flatnonzero(images >= self.n)).size:
            images[outside] = self._walk(images[outside])
        return images.astype(np.int64).reshape(indices.shape)

    def _walk(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = np.divmod(numbers, self._right_size)
        for left_key, right_key in self._keys.reshape(-1, 2):
            left = (left + _hash(right ^ left_key) % self._left_size) % self._left_size
            right = (right + _hash(left ^ right_key) % self._right_size) % self._right_size
        return left * self._right_size + right


class Order(Protocol):
    """``num_windows``: samples in an epoch; ``wraps``: whether windows go on at the stream's start past its end."""

    num_windows: int
    wraps: bool

    def starts(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """First tokens [N] of the samples [N]."""
        ...


class ShuffledOrder:
    """Endless epochs, each in its own order and with its own shift of the windows on the stream, closed to a ring.

    Raises:
        DataError: the stream is too short for one window.
    """

    wraps = True

    def __init__(self, num_tokens: int, seq_len: int, seed: int):
        self.num_windows = (num_tokens - 1) // seq_len
        if self.num_windows < 1:
            raise DataError(
                f"the data set has {num_tokens} tokens, a sample needs {seq_len + 1}: lower data.seq_len or add data"
            )
        self._num_tokens = num_tokens
        self._seq_len = seq_len
        self._seed = seed

    def starts(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """First tokens [N] of the samples [N]; a window may run over the stream's end."""
        epochs, indices = np.divmod(sample_ids, self.num_windows)
        starts = np.empty_like(sample_ids)
        for epoch in np.unique(epochs).tolist():
            own = epochs == epoch
            windows = Permutation(self._seed, self.num_windows, epoch)(indices[own])
            shift = int(_keyed_words(f"shift {self._seed} {epoch}", 1)[0] % np.uint64(self._seq_len))
            starts[own] = (windows * self._seq_len + shift) % self._num_tokens
        return starts


class SequentialOrder:
    """The stream from its start to its end, once; the last window may be short. Samples after it are empty."""

    wraps = False

    def __init__(self, num_tokens: int, seq_len: int):
        self.num_windows = -(-(num_tokens - 1) // seq_len)
        self._num_tokens = num_tokens
        self._seq_len = seq_len

    def starts(self, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """First tokens [N] of the samples [N]; the end of the stream for the empty ones after the last window."""
        return np.minimum(sample_ids * self._seq_len, self._num_tokens)


def _keyed_words(key: str, count: int) -> NDArray[np.uint64]:
    """``count`` (at most 8) random 64-bit words, the same for the same key on every machine."""
    return np.frombuffer(hashlib.blake2b(key.encode(), digest_size=8 * count).digest(), "<u8").astype(np.uint64)


def _hash(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mixes the bits of each word (the finalizer of SplitMix64; Steele, Lea & Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
