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
from megatrain.data.feed.objectives import Objective
from megatrain.data.feed.prefetch import prefetch
from megatrain.data.feed.rows import Batch, Rows, Samples
from megatrain.data.feed.steps import Steps

SAMPLE_BITS = (1 << 48) - 1
"""The bits of a sequence's id that are its sample's number; those above tell the parts of a sample apart."""

# Samples whose places are computed at once: few at first, for a quick start, then many, because numpy's calls cost more
# than the arithmetic of a few.
_FIRST_AT_ONCE, _AT_ONCE = 64, 4096


class SampleMap(Protocol):
    """(source, number in it) of each global sample [n]. ``num_samples``: how many there are, None: no end."""

    num_samples: int | None

    def __call__(self, sample_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...


class _Reads(NamedTuple):
    """What this rank reads after each number ``done`` of steps, which have one shape, by step.

    ``sources``, ``places`` [samples]: of its samples; ``ids``, ``sequence_sources`` [N]: of its sequences.
    """

    done: range
    sources: NDArray[np.int64]
    places: NDArray[np.int64]
    ids: Sequence[Tensor]
    sequence_sources: Sequence[Tensor]


class Loader:
    """A step holds a run of samples; this rank reads its block of the sequences that they are cut into.

    Where a step is meant, ``done`` says how many were made before it: the first step comes after 0.

    Args:
        sources: what samples come from.
        sample_map: (source, number in it) of each global sample: a ``Blend``.
        steps: batch size and sequence length of every step.
        dp_rank, dp_size: this rank's place among those that read different sequences.
        documents: whether batches tell documents apart (``Batch.positions``).
        objective: what is to be learned of the tokens; None: the next ones, as the sources give them.
        pin: page-locked memory, for a GPU to copy from.
    Raises:
        ValueError: a batch can't be split evenly, or there is no such rank.
    """

    def __init__(
        self,
        sources: Sequence[Samples],
        sample_map: SampleMap,
        steps: Steps,
        *,
        dp_rank: int,
        dp_size: int,
        documents: bool = False,
        objective: Objective | None = None,
        pin: bool = False,
    ):
        for shape in steps.shapes:
            if shape.batch_size % dp_size or not 0 <= dp_rank < dp_size:
                raise ValueError(f"a batch of {shape.batch_size} for rank {dp_rank} of {dp_size}")
        self.sources, self.steps = tuple(sources), steps
        self._sample_map, self._dp_rank, self._dp_size = sample_map, dp_rank, dp_size
        self._documents, self._objective, self._pin = documents, objective, pin
        self._reads: _Reads | None = None

    def batch(self, done: int) -> Batch:
        """This rank's sequences of the step after ``done`` ones.

        Raises:
            DataError: the files are damaged, or hold an id outside the model's vocabulary; there are no more samples.
        """
        end = self._sample_map.num_samples
        if end is not None and self.steps.first_sample(done + 1) > end:
            raise DataError(f"step {done + 1} reads behind the last of {end} samples: all sources are used up")
        reads = self._reads
        if reads is None or done not in reads.done:
            reads = self._reads = self._computed(done)
        at, (rows_of, first, count) = done - reads.done.start, self._own(done)
        places = reads.places[at]
        rows = Rows(len(rows_of), self.steps.window, self.steps.shape(done).seq_len, self._documents, self._pin)
        if len(self.sources) == 1:
            self.sources[0].fill(places, rows, slice(None))
        else:
            for number in np.unique(reads.sources[at]).tolist():
                own = np.flatnonzero(reads.sources[at] == number)
                self.sources[number].fill(places[own], rows, own)
        tokens, labels, *positions = rows.sequences(first, count)
        batch = Batch(
            tokens,
            labels,
            reads.ids[at],
            positions[0] if positions else None,
            reads.sequence_sources[at],
            rows.lengths(first, count),
        )
        return batch if self._objective is None else self._objective(batch)

    def batches(self, done: int, last_step: int) -> Generator[Batch, None, None]:
        """The batches of the steps after ``done`` ones up to ``last_step``, read ahead in a thread until closed."""
        return prefetch(map(self.batch, range(done, last_step)))

    def _own(self, done: int) -> tuple[range, int, int]:
        """The samples that hold this rank's sequences, the first sequence's number in them, and how many it has."""
        shape = self.steps.shape(done)
        cuts = self.steps.window // shape.seq_len
        count = shape.batch_size // self._dp_size
        first = self._dp_rank * count
        base = self.steps.first_sample(done)
        return range(base + first // cuts, base + -(-(first + count) // cuts)), first % cuts, count

    def _computed(self, done: int) -> _Reads:
        """What is read in as many steps of one shape as are worth computing at once."""
        samples, first, count = self._own(done)
        goes_on = self._reads is not None and done == self._reads.done.stop
        steps = self.steps.run(done, max(1, (_AT_ONCE if goes_on else _FIRST_AT_ONCE) // len(samples)))
        shape = self.steps.shape(done)
        ids = np.array(samples) + np.arange(len(steps))[:, None] * self.steps.samples_per_step(shape)
        sources, indices = (found.reshape(ids.shape) for found in self._sample_map(ids.ravel()))
        places = np.empty_like(indices)
        for number in np.unique(sources).tolist():
            own = sources == number
            places[own] = self.sources[number].places(indices[own])
        sample, cut = np.divmod(np.arange(first, first + count), self.steps.window // shape.seq_len)
        columns = ids[:, sample] + cut * (SAMPLE_BITS + 1), sources[:, sample]
        return _Reads(steps, sources, places, *(torch.from_numpy(column).unbind() for column in columns))


class OneSource:
    """The map for a ``Loader`` of one source, whose samples are the global samples."""

    num_samples: int | None = None

    def __call__(self, sample_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return np.zeros_like(sample_ids), sample_ids
