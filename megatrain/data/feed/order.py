"""Keyed bijections: in which order an epoch visits its samples. Nothing is stored: O(1) for any number."""

import functools
import hashlib
import math

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8  # with 6, some permutations of a handful of windows are visibly likelier than others


class Permutation:
    """A keyed bijection on [0, n).

    A Feistel network on pairs (left, right) with n <= left_size * right_size: each round adds to one half a keyed hash
    of the other, which can be undone, so the whole is a bijection on the pairs. A result that is no number below
    n is sent through again ("cycle walking") until it is one: the cycle that it lies on began below n.

    Args:
        key: any text; another one, another bijection.
        n: size of the domain, 1 to 2^62.
    """

    def __init__(self, key: str, n: int):
        if not 1 <= n <= 1 << 62:
            raise ValueError(f"a permutation of {n} numbers")
        self.n = n
        # nearly square and barely larger than n, so that few results need a second walk
        self._left_size = np.uint64(math.isqrt(n - 1) + 1)
        self._right_size = np.uint64(-(-n // int(self._left_size)))
        self._keys = _keyed_words(f"order {key}", _ROUNDS)

    def __call__(self, indices: NDArray[np.integer]) -> NDArray[np.int64]:
        """Images [...] of ``indices`` [...], each in [0, n)."""
        indices = np.asarray(indices)
        if indices.size and (indices.min() < 0 or indices.max() >= self.n):
            raise IndexError(f"indices outside of [0, {self.n})")
        images = self._walk(indices.astype(np.uint64).ravel())
        while (outside := np.flatnonzero(images >= self.n)).size:
            images[outside] = self._walk(images[outside])
        return images.astype(np.int64).reshape(indices.shape)

    def inverse(self, image: int) -> int:
        """The index whose image this is."""
        index = self._walk_back(image)
        while index >= self.n:
            index = self._walk_back(index)
        return index

    def _walk_back(self, number: int) -> int:
        sizes = int(self._left_size), int(self._right_size)
        left, right = divmod(number, sizes[1])
        for left_key, right_key in self._keys.reshape(-1, 2)[::-1]:
            right = (right - int(_hash(np.array([left], np.uint64) ^ right_key)[0]) % sizes[1]) % sizes[1]
            left = (left - int(_hash(np.array([right], np.uint64) ^ left_key)[0]) % sizes[0]) % sizes[0]
        return left * sizes[1] + right

    def _walk(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = np.divmod(numbers, self._right_size)
        for left_key, right_key in self._keys.reshape(-1, 2):
            left = (left + _hash(right ^ left_key) % self._left_size) % self._left_size
            right = (right + _hash(left ^ right_key) % self._right_size) % self._right_size
        return left * self._right_size + right


class Epochs:
    """Endless epochs over [0, n), each in its own order. Index i is the (i mod n)-th of epoch i // n."""

    def __init__(self, key: str, n: int):
        self.key, self.n = key, n
        self._permutation = functools.lru_cache(4)(lambda epoch: Permutation(f"{key} {epoch}", n))

    def __call__(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(epoch, number below n) of each index."""
        epochs, places = np.divmod(indices, self.n)
        numbers = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            own = epochs == epoch
            numbers[own] = self._permutation(epoch)(places[own])
        return epochs, numbers

    def index_of(self, number: int, epoch: int) -> int:
        """The index that stands for ``number`` in an epoch."""
        return epoch * self.n + self._permutation(epoch).inverse(number)


def keyed_number(key: str, n: int) -> int:
    """A number in [0, n), the same for the same key on every machine."""
    return int(_keyed_words(f"number {key}", 1)[0]) % n


def keyed_stream(key: str, ids: NDArray[np.int64], count: int) -> NDArray[np.uint64]:
    """``count`` random 64-bit words for each of ``ids`` [n]: [n, count], a function of the key and the id alone.

    SplitMix64 (Steele, Lea & Flood 2014), started for each id at a keyed hash of it.
    """
    starts = _hash(ids.astype(np.uint64) ^ _keyed_words(f"stream {key}", 1)[0])
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return _hash(starts[:, None] + steps)


def _keyed_words(key: str, count: int) -> NDArray[np.uint64]:
    """``count`` (at most 8) random 64-bit words, the same for the same key on every machine."""
    return np.frombuffer(hashlib.blake2b(key.encode(), digest_size=8 * count).digest(), "<u8").astype(np.uint64)


def _hash(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mixes the bits of each word (the finalizer of SplitMix64; Steele, Lea & Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
