"""Which samples a step reads, while batch size and sequence length grow.

A *sample* is always ``window`` tokens long, so the order of samples knows nothing of batches. Where a step wants
shorter sequences, each sample is cut into several of them.
"""

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """Steps from number ``from_step`` on (counted from 0): ``batch_size`` sequences of ``seq_len`` tokens each."""

    from_step: int
    batch_size: int
    seq_len: int


class Steps:
    """The stages of a run, in rising order, the first from step 0 on.

    Args:
        window: tokens of a sample; each stage's step must read whole samples.
    """

    def __init__(self, stages: Sequence[Stage], window: int):
        self.stages, self.window = tuple(stages), window
        self._from = [stage.from_step for stage in stages]
        self._samples = [0]
        for stage, following in itertools.pairwise(stages):
            steps = following.from_step - stage.from_step
            self._samples.append(self._samples[-1] + steps * self.samples_per_step(stage))

    def stage(self, step: int) -> Stage:
        """What holds at ``step``."""
        return self.stages[bisect_right(self._from, step) - 1]

    def first_sample(self, step: int) -> int:
        """Number of the first sample that ``step`` reads: how many all steps before have read."""
        at = bisect_right(self._from, step) - 1
        return self._samples[at] + (step - self._from[at]) * self.samples_per_step(self.stages[at])

    def step_of(self, sample: int) -> int:
        """The step that reads a sample."""
        at = bisect_right(self._samples, sample) - 1
        return self._from[at] + (sample - self._samples[at]) // self.samples_per_step(self.stages[at])

    def run(self, step: int, most: int) -> range:
        """The steps from ``step`` on, at most so many, that are in its stage."""
        following = bisect_right(self._from, step)
        end = self._from[following] if following < len(self._from) else step + most
        return range(step, min(step + most, end))

    def samples_per_step(self, stage: Stage) -> int:
        return stage.batch_size * stage.seq_len // self.window


def continued(saved: Sequence[Stage], wanted: Sequence[Stage], step: int) -> list[Stage]:
    """The ``saved`` stages up to ``step``, and from there on the ``wanted`` ones."""
    before = [stage for stage in saved if stage.from_step < step]
    current = [stage for stage in wanted if stage.from_step <= step][-1]
    after = [stage for stage in wanted if stage.from_step > step]
    if before and (before[-1].batch_size, before[-1].seq_len) == (current.batch_size, current.seq_len):
        return [*before, *after]
    return [*before, Stage(step, current.batch_size, current.seq_len), *after]
