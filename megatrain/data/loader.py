"""A rank's share of every global batch, as a pure function of the step.

Shapes: N sequences of this rank in a step, S tokens in a sequence.
"""

from collections.abc import Generator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from megatrain.data.errors import DataError
from megatrain.data.prefetch import prefetch
from megatrain.data.rows import Batch, Rows, Samples
from megatrain.data.steps import Stage, Steps

SAMPLE_BITS = (1 << 48) - 1
"""The bits of a sequence's id that are its sample's number; those above tell the parts of a sample apart."""

_PLANNED = 4096  # samples whose places are computed at once: numpy's calls cost more than the arithmetic of a few


class Which(Protocol):
    """(source, number in it) of each global sample [n]. ``num_samples``: how many there are, None: no end."""

    num_samples: int | None

    def __call__(self, sample_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...


class Loader:
    """A step holds a run of samples; this rank reads its block of the sequences that they are cut into.

    Steps count from 0.

    Args:
        sources: what samples come from.
        which: (source, number in it) of each global sample: a ``Blend``.
        steps: batch size and sequence length of every step.
        dp_rank, dp_size: this rank's place among those that read different sequences.
        documents: whether batches tell documents apart (``Batch.positions``).
        pin: page-locked memory, for a GPU to copy from.
    Raises:
        ValueError: a batch can't be split evenly, or there is no such rank.
    """

    def __init__(
        self,
        sources: Sequence[Samples],
        which: Which,
        steps: Steps,
        *,
        dp_rank: int,
        dp_size: int,
        documents: bool = False,
        pin: bool = False,
    ):
        for stage in steps.stages:
            if stage.batch_size % dp_size or not 0 <= dp_rank < dp_size:
                raise ValueError(f"a batch of {stage.batch_size} for rank {dp_rank} of {dp_size}")
        self.sources, self.steps = tuple(sources), steps
        self._which, self._dp_rank, self._dp_size = which, dp_rank, dp_size
        self._documents, self._pin = documents, pin
        self._planned: tuple[range, Stage, NDArray[np.int64], NDArray[np.int64]] | None = None

    def batch(self, step: int) -> Batch:
        """This rank's sequences of ``step``.

        Raises:
            DataError: the files are damaged, or hold an id outside the model's vocabulary; there are no more samples.
        """
        end = self._which.num_samples
        if end is not None and self.steps.first_sample(step + 1) > end:
            raise DataError(f"step {step + 1} reads behind the last of {end} samples: all sources are used up")
        sources, places = self._plan(step)
        stage = self.steps.stage(step)
        samples, first, count = self._own(step)
        rows = Rows(len(samples), self.steps.window, stage.seq_len, self._documents, self._pin)
        if len(self.sources) == 1:
            self.sources[0].fill(places, rows, slice(None))
        else:
            for number in np.unique(sources).tolist():
                own = np.flatnonzero(sources == number)
                self.sources[number].fill(places[own], rows, own)
        cuts = self.steps.window // stage.seq_len
        tokens, labels, *positions = rows.sequences(first, count)
        numbers = np.arange(first, first + count)
        ids = np.asarray(samples)[numbers // cuts] + (numbers % cuts) * (SAMPLE_BITS + 1)
        return Batch(
            tokens,
            labels,
            torch.from_numpy(ids),
            positions[0] if positions else None,
            torch.from_numpy(sources[numbers // cuts]),
        )

    def batches(self, first_step: int, end_step: int) -> Generator[Batch, None, None]:
        """The batches of the steps ``first_step`` to ``end_step - 1``, read ahead in a thread until closed."""
        return prefetch(map(self.batch, range(first_step, end_step)))

    def _own(self, step: int) -> tuple[range, int, int]:
        """The samples that hold this rank's sequences, the first sequence's number in them, and how many it has."""
        stage = self.steps.stage(step)
        cuts = self.steps.window // stage.seq_len
        count = stage.batch_size // self._dp_size
        first = self._dp_rank * count
        base = self.steps.first_sample(step)
        return range(base + first // cuts, base + -(-(first + count) // cuts)), first % cuts, count

    def _plan(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sources and places of this rank's samples, computed for many steps at once."""
        if self._planned is None or step not in self._planned[0] or self.steps.stage(step) != self._planned[1]:
            self._planned = self._planned_from(step)
        steps, _, sources, places = self._planned
        return sources[step - steps.start], places[step - steps.start]

    def _planned_from(self, step: int) -> tuple[range, Stage, NDArray[np.int64], NDArray[np.int64]]:
        stage, rows = self.steps.stage(step), len(self._own(step)[0])
        steps = range(step, step + max(1, _PLANNED // rows))
        ids = np.array([self._own(number)[0] for number in steps if self.steps.stage(number) == stage])
        sources, indices = self._which(ids.ravel())
        places = np.empty_like(indices)
        for number in np.unique(sources).tolist():
            own = sources == number
            places[own] = self.sources[number].places(indices[own])
        return steps, stage, sources.reshape(ids.shape), places.reshape(ids.shape)


class OneSource:
    """For a ``Loader`` of one source: its samples are the global samples."""

    num_samples: int | None = None

    def __call__(self, sample_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return np.zeros_like(sample_ids), sample_ids
