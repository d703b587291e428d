"""Which samples a step reads, while batch size and sequence length grow.

A *sample* is always ``window`` tokens long, so the order of samples knows nothing of batches. Where a step wants
shorter sequences, each sample is cut into several of them.
"""

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StepShape:
    """What the steps after number ``after_step`` read: ``batch_size`` sequences of ``seq_len`` tokens each."""

    after_step: int
    batch_size: int
    seq_len: int


class Steps:
    """The shapes of a run's steps, in rising order; the first holds from the beginning.

    Where a step is meant, ``done`` says how many were made before it: the first step comes after 0.

    Args:
        window: tokens of a sample; a step of each shape must read whole samples.
    """

    def __init__(self, shapes: Sequence[StepShape], window: int):
        self.shapes, self.window = tuple(shapes), window
        self._after = [shape.after_step for shape in shapes]
        self._samples = [0]
        for shape, following in itertools.pairwise(shapes):
            steps = following.after_step - shape.after_step
            self._samples.append(self._samples[-1] + steps * self.samples_per_step(shape))

    def shape(self, done: int) -> StepShape:
        """The shape of the step after ``done`` ones."""
        return self.shapes[bisect_right(self._after, done) - 1]

    def first_sample(self, done: int) -> int:
        """Number of the first sample that is not read yet after ``done`` steps: how many these have read."""
        at = bisect_right(self._after, done) - 1
        return self._samples[at] + (done - self._after[at]) * self.samples_per_step(self.shapes[at])

    def step_of(self, sample: int) -> int:
        """Number of the step that reads a sample; the first step is 1."""
        at = bisect_right(self._samples, sample) - 1
        return 1 + self._after[at] + (sample - self._samples[at]) // self.samples_per_step(self.shapes[at])

    def run(self, done: int, most: int) -> range:
        """``done`` and the numbers after it, at most so many, whose steps have the same shape."""
        following = bisect_right(self._after, done)
        end = self._after[following] if following < len(self._after) else done + most
        return range(done, min(done + most, end))

    def samples_per_step(self, shape: StepShape) -> int:
        return shape.batch_size * shape.seq_len // self.window


def continued(saved: Sequence[StepShape], wanted: Sequence[StepShape], done: int) -> list[StepShape]:
    """The ``saved`` shapes for ``done`` steps, and the ``wanted`` ones for those that come after."""
    before = [shape for shape in saved if shape.after_step < done]
    current = [shape for shape in wanted if shape.after_step <= done][-1]
    after = [shape for shape in wanted if shape.after_step > done]
    if before and (before[-1].batch_size, before[-1].seq_len) == (current.batch_size, current.seq_len):
        return [*before, *after]
    return [*before, StepShape(done, current.batch_size, current.seq_len), *after]
