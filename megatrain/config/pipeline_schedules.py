"""The pipeline schedules: the one table of what each asks for, and what it is called elsewhere."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PipelineSchedule:
    """A schedule of ``torch.distributed.pipelining``.

    ``torch_name``: its class there; ``least_stages``, ``most_stages`` (None: no limit): stages on a rank;
    ``in_flight``: micro-batches of a rank in a step, at least so many for each pipeline rank; ``in_rounds``: they are
    taken in equal rounds; ``v_shaped``: the second stage of a rank counts from the end, so the first rank holds both
    ends of the model; ``splits_backward``: gradients of inputs and of weights are computed apart; ``in_pairs``: a
    forward and a backward of two micro-batches count as one action.
    """

    torch_name: str
    least_stages: int = 1
    most_stages: int | None = 1
    in_flight: int = 0
    in_rounds: bool = False
    v_shaped: bool = False
    splits_backward: bool = False
    in_pairs: bool = False

    def takes_stages(self, stages_per_rank: int) -> bool:
        """Whether a rank can have so many stages."""
        return self.least_stages <= stages_per_rank <= (self.most_stages or stages_per_rank)

    def takes_micro_batches(self, number: int, pp: int) -> bool:
        """Whether it runs so many micro-batches over ``pp`` ranks: the conditions of torch's classes."""
        rounds = max(1, number // pp) if self.in_rounds else 1
        return number >= self.in_flight * pp and number % rounds == 0

    @property
    def stages_in_words(self) -> str:
        return str(self.least_stages) if self.most_stages else f"{self.least_stages} or more"

    @property
    def micro_batches_in_words(self) -> str:
        if self.in_rounds:
            return "equal rounds of about `pp`"
        return {0: "any", 1: "`pp` or more"}.get(self.in_flight, f"`{self.in_flight} pp` or more")


PIPELINE_SCHEDULES = {
    "gpipe": PipelineSchedule("GPipe"),
    "1f1b": PipelineSchedule("1F1B", in_flight=1),
    "interleaved_1f1b": PipelineSchedule("Interleaved1F1B", 2, None, in_rounds=True),
    "interleaved_zero_bubble": PipelineSchedule("InterleavedZeroBubble", 2, None, in_rounds=True, splits_backward=True),
    "zbv": PipelineSchedule("ZBVZeroBubble", 2, 2, v_shaped=True, splits_backward=True),
    "dualpipev": PipelineSchedule("DualPipeV", 2, 2, in_flight=2, v_shaped=True, splits_backward=True, in_pairs=True),
}
"""By the names of ``parallel.pp_schedule``."""
