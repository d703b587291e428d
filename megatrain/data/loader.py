"""A rank's share of every global batch, as a pure function of the step.

Shapes: N sequences of this rank in a step, S tokens in a sequence.
"""

from collections.abc import Generator
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatrain.data.order import Order, SequentialOrder, ShuffledOrder
from megatrain.data.prefetch import prefetch
from megatrain.data.reader import TokenDataset

IGNORE = -100  # label of a position without loss


class Batch(NamedTuple):
    """int64: ``tokens`` [N, S]; ``labels`` [N, S], the next tokens or IGNORE; ``sample_ids`` [N], global numbers.

    ``positions`` [N, S]: places of the tokens in their documents; None where each sequence counts as one.
    """

    tokens: Tensor
    labels: Tensor
    sample_ids: Tensor
    positions: Tensor | None = None


class Loader:
    """A step holds the samples from step * global_batch_size on; this rank reads its block of them.

    Steps count from 0. Shuffled (training): endless. Sequential (validation): the data set once, in order; what comes
    after it are samples whose labels are all IGNORE, so every rank may go on to the same step.

    Args:
        dataset: where the tokens are.
        seq_len: S.
        global_batch_size: sequences of a step over all data-parallel ranks.
        dp_rank, dp_size: this rank's place among those that read different sequences.
        seed: of the shuffled order.
        order: "shuffled" or "sequential".
    Raises:
        ValueError: the batch can't be split evenly, or there is no such rank.
        DataError: the data set is shorter than one sample (shuffled).
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        seq_len: int,
        global_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seed: int = 0,
        order: Literal["shuffled", "sequential"] = "shuffled",
    ):
        if global_batch_size % dp_size or not 0 <= dp_rank < dp_size:
            raise ValueError(f"global_batch_size {global_batch_size} for rank {dp_rank} of {dp_size}")
        self.dataset = dataset
        self.seq_len = seq_len
        self.global_batch_size = global_batch_size
        self._share = global_batch_size // dp_size
        self._offset = dp_rank * self._share
        self._order: Order = (
            ShuffledOrder(dataset.num_tokens, seq_len, seed)
            if order == "shuffled"
            else SequentialOrder(dataset.num_tokens, seq_len)
        )

    @property
    def samples_per_epoch(self) -> int:
        """Windows that an epoch visits."""
        return self._order.num_windows

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every window has been visited; the last may go over into the next epoch."""
        return -(-self.samples_per_epoch // self.global_batch_size)

    def batch(self, step: int) -> Batch:
        """This rank's sequences of ``step`` (from 0).

        Raises:
            DataError: the data set holds an id outside the vocabulary that it was opened for.
        """
        first = step * self.global_batch_size + self._offset
        return self.samples(np.arange(first, first + self._share))

    def batches(self, first_step: int, end_step: int) -> Generator[Batch, None, None]:
        """The batches of the steps ``first_step`` to ``end_step - 1``, read ahead in a thread until closed."""
        return prefetch(map(self.batch, range(first_step, end_step)))

    def samples(self, sample_ids: NDArray[np.int64]) -> Batch:
        """The samples of these global numbers [N], whoever's they are."""
        windows = np.zeros((len(sample_ids), self.seq_len + 1), np.int64)
        labels = windows[:, 1:].copy()
        for row, start in enumerate(self._order.starts(sample_ids).tolist()):
            window = self._window(start)
            windows[row, : len(window)] = window
            labels[row] = IGNORE
            labels[row, : max(len(window) - 1, 0)] = window[1:]
        tokens = torch.from_numpy(windows[:, :-1].copy())
        return Batch(tokens, torch.from_numpy(labels), torch.from_numpy(sample_ids))

    def _window(self, start: int) -> NDArray[np.int64]:
        """S + 1 tokens from ``start`` on, or the fewer that are left where the order doesn't wrap."""
        count = min(self.seq_len + 1, self.dataset.num_tokens - start)
        window = self.dataset.tokens(start, count)
        if self._order.wraps and count <= self.seq_len:
            window = np.concatenate([window, self.dataset.tokens(0, self.seq_len + 1 - count)])
        return window
