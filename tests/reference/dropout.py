"""Dropout (Srivastava et al. 2014) whose masks are a hash of sample, place and element (docs/parity.md).

Shapes: B sequences, S positions, D width, H heads.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

Numbers = np.ndarray


def mixed(x: Numbers) -> Numbers:
    """Wellons' "lowbias32" of 32-bit words."""
    x = x.astype(np.uint32)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


class Dropout:
    """Masks of one step's sequences, whose global numbers are ``ids``; None while evaluating: nothing is dropped."""

    def __init__(self, probability: float, seed: int, ids: list[int] | None):
        self.probability, self.keys = probability, None
        if ids is not None and probability > 0:
            low = np.array([number % 2**32 ^ seed * 0x9E3779B1 % 2**32 for number in ids], np.uint32)
            high = np.array([number >> 32 for number in ids], np.uint32)
            self.keys = mixed(mixed(low) ^ high)

    def activations(self, x_BSD: Tensor, place: str) -> Tensor:
        if self.keys is None:
            return x_BSD
        elements = np.arange(x_BSD[0].numel(), dtype=np.uint32).reshape(x_BSD.shape[1:])
        return self._dropped(x_BSD, mixed(mixed(elements) ^ self._at(place)[:, None, None]))

    def probabilities(self, x_BHSS: Tensor, place: str) -> Tensor:
        if self.keys is None:
            return x_BHSS
        heads, positions = (np.arange(size, dtype=np.uint32) for size in x_BHSS.shape[1:3])
        pairs = mixed(mixed(positions)[:, None] ^ positions)
        return self._dropped(x_BHSS, mixed(pairs ^ mixed(self._at(place)[:, None] ^ heads)[:, :, None, None]))

    def _at(self, place: str) -> Numbers:
        site = np.frombuffer(hashlib.sha256(place.encode()).digest()[:4], "<u4")
        assert self.keys is not None
        return mixed(self.keys ^ site)

    def _dropped(self, x: Tensor, words: Numbers) -> Tensor:
        kept = torch.from_numpy(words.astype(np.int64) >= int(self.probability * 2**32))
        return torch.where(kept, x / (1 - self.probability), 0.0)
