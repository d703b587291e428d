"""Which sample comes when (docs/data_format.md, "The order of samples"): keyed bijections and blends, one by one."""

import hashlib
import math
from bisect import bisect_right
from fractions import Fraction
from typing import Any

_WORD = 2**64 - 1
_BLOCK = 1024


def words(text: str, count: int) -> list[int]:
    """``count`` 64-bit words from BLAKE2b."""
    digest = hashlib.blake2b(text.encode(), digest_size=8 * count).digest()
    return [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(count)]


def splitmix(x: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea & Flood 2014)."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _WORD
    return x ^ x >> 31


def permutation(key: str, n: int) -> list[int]:
    """Images of 0 to n - 1: four double rounds of a Feistel network on (left, right), walked until below n."""
    left_size = math.ceil(math.sqrt(n)) if n < 2**50 else math.isqrt(n - 1) + 1
    right_size = math.ceil(n / left_size)
    keys = words(f"order {key}", 8)
    images = []
    for number in range(n):
        image = n
        while image >= n:
            left, right = divmod(number, right_size)
            for i in range(0, 8, 2):
                left = (left + splitmix(right ^ keys[i]) % left_size) % left_size
                right = (right + splitmix(left ^ keys[i + 1]) % right_size) % right_size
            number = image = left * right_size + right
        images.append(image)
    return images


class Blend:
    """(source, number in it) of each sample of a run, for weights that may change at some samples.

    ``changes``: (first sample, weight of each source).
    """

    def __init__(self, changes: list[tuple[int, list[Fraction]]], seed: int):
        self._changes, self._seed = changes, seed
        self._made: list[tuple[int, int]] = []
        self._given = [0] * len(changes[0][1])

    def __call__(self, sample: int) -> tuple[int, int]:
        if len(self._given) == 1:
            return 0, sample
        while len(self._made) <= sample:
            self._add_block()
        return self._made[sample]

    def _add_block(self) -> None:
        """Each source's exact share of the block, in a keyed order; each gives its own samples in turn."""
        at = len(self._made)
        number = bisect_right([first for first, _ in self._changes], at) - 1
        first, weights = self._changes[number]
        end = self._changes[number + 1][0] if number + 1 < len(self._changes) else None
        begin, total = at - first, sum(weights)
        unit = max(_BLOCK, 2 ** math.ceil(math.log2(2 * total / min(w for w in weights if w))))
        size = unit if end is None or end - at >= 2 * unit else end - at  # the last one takes in what is left
        edges = [_rounded(sum(weights[:i]) / total * (begin + size)) for i in range(len(weights) + 1)]
        before = [_rounded(sum(weights[:i]) / total * begin) for i in range(len(weights) + 1)]
        shares = [edges[i + 1] - edges[i] - before[i + 1] + before[i] for i in range(len(weights))]
        sources = [source for source, share in enumerate(shares) for _ in range(share)]
        for place in permutation(f"blend {self._seed} {first} {begin}", size):
            self._made.append((sources[place], self._given[sources[place]]))
            self._given[sources[place]] += 1


def _rounded(x: Fraction) -> int:
    """Halves up."""
    return math.floor(x + Fraction(1, 2))


def stages(config: dict[str, Any]) -> list[tuple[int, int, int]]:
    """(sequences, their length, first sample) of every step, from the ramp (docs/data.md)."""
    train, length = config["train"], config["data"]["seq_len"]
    found, sample = [], 0
    for step in range(1, train["steps"] + 1):
        stage = next((stage for stage in train["ramp"] if step <= stage["until_step"]), {})
        size, own = stage.get("global_batch_size") or train["global_batch_size"], stage.get("seq_len") or length
        found.append((size, own, sample))
        sample += size * own // length
    return found
