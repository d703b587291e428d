"""A rank's share of every global batch, as a pure function of the step.

Shapes: N sequences of this rank in a step, S tokens in a sequence.
"""

from collections.abc import Generator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatrain.data.errors import DataError
from megatrain.data.feed.prefetch import prefetch
from megatrain.data.feed.rows import Batch, Rows, Samples
from megatrain.data.feed.steps import Steps

SAMPLE_BITS = (1 << 48) - 1
"""The bits of a sequence's id that are its sample's number; those above tell the parts of a sample apart."""

# Samples whose places are computed at once: few at first, for a quick start, then many, because numpy's calls cost more
# than the arithmetic of a few.
_FIRST_PLANNED, _PLANNED = 64, 4096


class Which(Protocol):
    """(source, number in it) of each global sample [n]. ``num_samples``: how many there are, None: no end."""

    num_samples: int | None

    def __call__(self, sample_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...


class _Plan(NamedTuple):
    """What this rank reads at the ``steps`` of one stage, by step.

    ``sources``, ``places`` [samples]: of its samples; ``ids``, ``sequence_sources`` [N]: of its sequences.
    """

    steps: range
    sources: NDArray[np.int64]
    places: NDArray[np.int64]
    ids: Sequence[Tensor]
    sequence_sources: Sequence[Tensor]


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
        self._plan: _Plan | None = None

    def batch(self, step: int) -> Batch:
        """This rank's sequences of ``step``.

        Raises:
            DataError: the files are damaged, or hold an id outside the model's vocabulary; there are no more samples.
        """
        end = self._which.num_samples
        if end is not None and self.steps.first_sample(step + 1) > end:
            raise DataError(f"step {step + 1} reads behind the last of {end} samples: all sources are used up")
        plan = self._plan
        if plan is None or step not in plan.steps:
            plan = self._plan = self._planned(step)
        at, (rows_of, first, count) = step - plan.steps.start, self._own(step)
        places = plan.places[at]
        rows = Rows(len(rows_of), self.steps.window, self.steps.stage(step).seq_len, self._documents, self._pin)
        if len(self.sources) == 1:
            self.sources[0].fill(places, rows, slice(None))
        else:
            for number in np.unique(plan.sources[at]).tolist():
                own = np.flatnonzero(plan.sources[at] == number)
                self.sources[number].fill(places[own], rows, own)
        tokens, labels, *positions = rows.sequences(first, count)
        return Batch(
            tokens,
            labels,
            plan.ids[at],
            positions[0] if positions else None,
            plan.sequence_sources[at],
            rows.lengths(first, count),
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

    def _planned(self, step: int) -> _Plan:
        """For as many steps of one stage as are worth computing at once."""
        samples, first, count = self._own(step)
        goes_on = self._plan is not None and step == self._plan.steps.stop
        steps = self.steps.run(step, max(1, (_PLANNED if goes_on else _FIRST_PLANNED) // len(samples)))
        stage = self.steps.stage(step)
        ids = np.array(samples) + np.arange(len(steps))[:, None] * self.steps.samples_per_step(stage)
        sources, indices = (found.reshape(ids.shape) for found in self._which(ids.ravel()))
        places = np.empty_like(indices)
        for number in np.unique(sources).tolist():
            own = sources == number
            places[own] = self.sources[number].places(indices[own])
        sample, cut = np.divmod(np.arange(first, first + count), self.steps.window // stage.seq_len)
        columns = ids[:, sample] + cut * (SAMPLE_BITS + 1), sources[:, sample]
        return _Plan(steps, sources, places, *(torch.from_numpy(column).unbind() for column in columns))


class OneSource:
    """For a ``Loader`` of one source: its samples are the global samples."""

    num_samples: int | None = None

    def __call__(self, sample_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return np.zeros_like(sample_ids), sample_ids
