"""Documents that were seen before: the same, or nearly the same, by MinHash (Broder 1997) and LSH."""

import hashlib
from collections.abc import Sequence

import numpy as np
from datasketch import MinHash, MinHashLSH
from numpy.typing import NDArray

from megatrain.data.corpus.words import words_of

NUM_PERMUTATIONS = 128
_SHINGLE_WORDS = 5
_SCHEME = "affine32"  # datasketch's name of its permutations


def exact_key(text: str) -> bytes:
    """Equal for texts of the same words, whatever their case and spaces."""
    return hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=16).digest()


def signature(text: str) -> NDArray[np.uint32]:
    """The MinHash [permutations] of a text's runs of five words, lower case; letters where a script has no spaces."""
    words = words_of(text.lower())
    num_shingles = max(1, len(words) - _SHINGLE_WORDS + 1)
    shingles = {" ".join(words[at : at + _SHINGLE_WORDS]).encode() for at in range(num_shingles)}
    made = MinHash(num_perm=NUM_PERMUTATIONS, seed=1, scheme=_SCHEME)
    made.update_batch(sorted(shingles))
    return np.asarray(made.hashvalues, np.uint32)


class Duplicates:
    """Remembers documents, in about 16 bytes for each exact and 2 KB for each near comparison.

    Args:
        threshold: the share of common runs of words (Jaccard similarity) from which two documents are nearly the same.
    """

    def __init__(self, threshold: float):
        self._threshold = threshold
        self._keys: set[bytes] = set()
        self._lsh = MinHashLSH(threshold=threshold, num_perm=NUM_PERMUTATIONS)
        self._signatures: list[NDArray[np.uint32]] = []

    def is_exact(self, key: bytes) -> bool:
        """Whether a document with this key was seen; it is now."""
        seen = key in self._keys
        self._keys.add(key)
        return seen

    def is_near(self, hashvalues: NDArray[np.uint32]) -> bool:
        """Whether a document that is nearly the same was kept; if not, this one is kept."""
        made = MinHash(num_perm=NUM_PERMUTATIONS, seed=1, hashvalues=hashvalues, scheme=_SCHEME)
        candidates: Sequence[int] = self._lsh.query(made)
        if any(np.mean(self._signatures[number] == hashvalues) >= self._threshold for number in candidates):
            return True
        self._lsh.insert(len(self._signatures), made, check_duplication=False)
        self._signatures.append(hashvalues)
        return False
