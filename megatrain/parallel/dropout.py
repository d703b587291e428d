"""Dropout as a pure function of (sample, place, element): no layout changes it.

A mask drawn from a random generator depends on what the rank drew before, so it changes with the
layout and must be saved and replayed. Here an element's fate is a hash of its sample's key, the
dropout's place in the model and the element's index in the whole (unsplit) tensor. So resuming and
recomputing need no generator state, and any split of the tensor gives the same mask.
"""

import hashlib
from collections.abc import Callable

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


class _Dropout(nn.Module):
    """Zeroes elements with ``probability`` and scales the rest by 1 / (1 - probability)."""

    def __init__(self, probability: float, site: str):
        super().__init__()
        self.probability = probability
        self.site = int.from_bytes(hashlib.sha256(site.encode()).digest()[:4], "little")

    def index(self, x: Tensor, keys_B: Tensor) -> tuple[Tensor, Tensor]:
        """Hashes of the elements and of the samples, which broadcast to the shape of ``x``."""
        raise NotImplementedError

    def forward(self, x: Tensor, keys_B: Tensor | None) -> Tensor:
        if not self.training or self.probability == 0.0:
            return x
        assert keys_B is not None, "dropout needs the samples' keys"
        index, keys = self.index(x, _mix(keys_B ^ self.site))
        keep = _mix(index ^ keys) >= int(self.probability * 2**32)
        return x * keep.to(x.dtype) / (1.0 - self.probability)


def has_dropout(model: nn.Module) -> bool:
    """Whether ``model`` drops anything in training."""
    return any(isinstance(module, _Dropout) and module.probability > 0 for module in model.modules())


class Dropout(_Dropout):
    """Dropout of activations [S, B, D]. ``rows``: true positions in the sequence of the S rows that are here."""

    def __init__(self, probability: float, site: str, rows: Callable[[int, torch.device], Tensor]):
        super().__init__(probability, site)
        self.rows = rows

    def index(self, x_SBD: Tensor, keys_B: Tensor) -> tuple[Tensor, Tensor]:
        seq, _, width = x_SBD.shape
        rows = self.rows(seq, x_SBD.device)
        index = rows[:, None, None] * width + torch.arange(width, device=x_SBD.device)
        return _mix(index & _MASK), keys_B[None, :, None]


class AttentionDropout(_Dropout):
    """Dropout of attention probabilities [B, H, S, T]: the last S of T positions attend to all T.

    ``part``: which part of the heads this rank holds.
    """

    def __init__(self, probability: float, site: str, part: int = 0):
        super().__init__(probability, site)
        self.part = part

    def index(self, x_BHST: Tensor, keys_B: Tensor) -> tuple[Tensor, Tensor]:
        _, heads, rows, cols = x_BHST.shape
        head = torch.arange(heads, device=x_BHST.device) + self.part * heads
        row = torch.arange(cols - rows, cols, device=x_BHST.device)[:, None]
        col = torch.arange(cols, device=x_BHST.device)
        return _mix(_mix(row) ^ col), _mix(keys_B[:, None] ^ head)[..., None, None]
