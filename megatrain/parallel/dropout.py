"""Dropout as a pure function of (sample, place, element): no layout changes it.

A mask drawn from a random generator depends on what the rank drew before, so it changes with the
layout and must be saved and replayed. Here an element's fate is a hash of its sample's key, the
dropout's place in the model and the element's index in the whole (unsplit) tensor. So resuming and
recomputing need no generator state, and any split of the tensor gives the same mask.
"""

import hashlib

import torch
from torch import Tensor, nn

_MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A bijective 32-bit mixer (xorshift-multiply, constants of the "lowbias32" search), in int64."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _MASK
    x = (x ^ (x >> 15)) * 0x846CA68B & _MASK
    return x ^ (x >> 16)


def dropout_keys(seed: int, sample_ids_B: Tensor) -> Tensor:
    """Keys [B] (32-bit, int64) of samples from the run's seed and their global numbers."""
    high, low = sample_ids_B >> 32, sample_ids_B & _MASK
    return _mix(_mix(low ^ (seed * 0x9E3779B1 & _MASK)) ^ high)


class Dropout(nn.Module):
    """Zeroes elements with ``probability`` and scales the rest by 1 / (1 - probability).

    ``part``: which part of the split dim this rank holds (the sequence of [S, B, D] activations, or
    with ``attention`` the heads of [B, H, S, S] probabilities).
    """

    def __init__(self, probability: float, site: str, part: int = 0, attention: bool = False):
        super().__init__()
        self.probability, self.part, self.attention = probability, part, attention
        self.site = int.from_bytes(hashlib.sha256(site.encode()).digest()[:4], "little")

    def forward(self, x: Tensor, keys_B: Tensor | None) -> Tensor:
        if not self.training or self.probability == 0.0:
            return x
        assert keys_B is not None, "dropout needs the samples' keys"
        keys = _mix(keys_B ^ self.site)
        index, keys = self._attention_index(x, keys) if self.attention else self._activation_index(x, keys)
        keep = _mix(index ^ keys) >= int(self.probability * 2**32)
        return x * keep.to(x.dtype) / (1.0 - self.probability)

    def _activation_index(self, x_SBD: Tensor, keys_B: Tensor) -> tuple[Tensor, Tensor]:
        seq, _, width = x_SBD.shape
        rows = torch.arange(seq, device=x_SBD.device) + self.part * seq
        index = rows[:, None, None] * width + torch.arange(width, device=x_SBD.device)
        return _mix(index & _MASK), keys_B[None, :, None]

    def _attention_index(self, p_BHST: Tensor, keys_B: Tensor) -> tuple[Tensor, Tensor]:
        _, heads, rows, cols = p_BHST.shape
        head = torch.arange(heads, device=p_BHST.device) + self.part * heads
        index = torch.arange(rows, device=p_BHST.device)[:, None] * cols + torch.arange(cols, device=p_BHST.device)
        return _mix(index & _MASK), _mix(keys_B[:, None] ^ head)[..., None, None]
