"""The sequences of a rank's step, as arrays to fill and as the batch that comes of them.

Shapes: N sequences, S tokens in a sequence.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Batch(NamedTuple):
    """int64: ``tokens`` [N, S]; ``labels`` [N, S], the next tokens or what else is to be predicted there, or IGNORE;
    ``sample_ids`` [N], global numbers.

    ``positions`` [N, S]: places of the tokens in their documents; None where each sequence counts as one.
    ``sources`` [N]: number of the source of each sequence. ``lengths`` [N]: tokens of each before its padding; None
    where sequences are full.
    """

    tokens: Tensor
    labels: Tensor
    sample_ids: Tensor
    positions: Tensor | None
    sources: Tensor
    lengths: Tensor | None = None

    def cu_seqlens(self) -> Tensor:
        """First place of each document in the flattened batch, and last its size: int32 [documents + 1]."""
        if self.positions is None:
            return torch.arange(0, self.tokens.numel() + 1, self.tokens.shape[1], dtype=torch.int32)
        begins = torch.nonzero(self.positions.flatten() == 0).flatten()
        return torch.cat([begins, begins.new_tensor([self.tokens.numel()])]).to(torch.int32)


class Rows:
    """Arrays [rows, S] for tokens, labels and, where documents are told apart, positions.

    Args:
        cut: length of the sequences that the rows will be cut into; a divisor of ``seq_len``.
        pin: allocate page-locked memory, from which a GPU copies without waiting.
    """

    def __init__(self, num_rows: int, seq_len: int, cut: int, documents: bool, pin: bool):
        self.cut = cut
        self._tensor = torch.empty(2 + documents, num_rows, seq_len, dtype=torch.int64, pin_memory=pin)
        array = self._tensor.numpy()
        self.tokens, self.labels = array[0], array[1]
        self.positions: NDArray[np.int64] | None = array[2] if documents else None
        self._lengths: NDArray[np.int64] | None = None

    def sequences(self, first: int, count: int) -> Sequence[Tensor]:
        """Tokens, labels and positions [count, cut] of the sequences from number ``first`` on."""
        kinds = self._tensor.view(len(self._tensor), -1, self.cut)
        return (kinds if count == kinds.shape[1] else kinds[:, first : first + count]).unbind()

    def lengths(self, first: int, count: int) -> Tensor | None:
        """Tokens [count] before the padding of the sequences from number ``first`` on; None: nothing was padded."""
        if self._lengths is None:
            return None
        begins = np.arange(0, self.tokens.shape[1], self.cut)
        lengths = np.clip(self._lengths[:, None] - begins, 0, self.cut).reshape(-1)
        return torch.from_numpy(lengths[first : first + count])

    def pad_from(self, own: slice | NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        """Says that the rows ``own`` [n] are padding from their places ``lengths`` [n] on."""
        if self._lengths is None:
            self._lengths = np.full(len(self.tokens), self.tokens.shape[1], np.int64)
        self._lengths[own] = lengths

    def restart_positions(self, own: slice | NDArray[np.int64], begins: NDArray[np.int64], count: int) -> None:
        """Positions of the ``count`` rows ``own``, from 0 at the places ``begins`` of them all and at each cut."""
        if self.positions is None:
            return
        size = count * self.positions.shape[1]
        bounds = np.concatenate((np.arange(0, size + 1, self.cut), begins))  # a place may come twice
        bounds.sort()
        before = np.repeat(bounds[:-1], bounds[1:] - bounds[:-1])
        if isinstance(own, slice):
            np.subtract(_places(size), before, out=self.positions[own].reshape(-1))
        else:
            self.positions[own] = (_places(size) - before).reshape(count, -1)


@functools.lru_cache(8)
def _places(size: int) -> NDArray[np.int64]:
    return np.arange(size)


class Samples(Protocol):
    """What a source gives out one by one. ``num_samples``: in an epoch, each is given once."""

    num_samples: int

    def places(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the samples [n] of these numbers stand; cheap, and cheaper for many at once."""
        ...

    def fill(self, places: NDArray[np.int64], rows: Rows, own: slice | NDArray[np.int64]) -> None:
        """Reads the samples at ``places`` [n] into the rows ``own``.

        Raises:
            DataError: the files are damaged.
        """
        ...

    def spans(self, index: int) -> list[tuple[int, int]]:
        """(first token, tokens) of the parts of the stream that a sample's inputs are."""
        ...

    def holding(self, begin: int, end: int, epoch: int) -> list[int]:
        """Numbers of an epoch's samples that have any of the tokens ``begin`` to ``end - 1`` of the stream."""
        ...
