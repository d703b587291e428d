"""Pipeline stages as arithmetic: which rank runs them, which blocks they hold, what a schedule asks for.

A stage is as slow as its work: the head multiplies by the whole vocabulary, so its stage gets fewer blocks.
Where blocks do not divide, this evens out the slowest stage and not the number of blocks.
"""

from dataclasses import dataclass
from itertools import accumulate, pairwise

from megatrain.config.derive import block_parameters
from megatrain.config.schema import ModelConfig, ParallelConfig, RunConfig


@dataclass(frozen=True)
class ScheduleTraits:
    """What a pipeline schedule asks for.

    ``v_shaped``: the second stage of a rank counts from the end, so the first rank holds both ends of the model.
    ``splits_backward``: gradients of inputs and of weights are computed apart.
    """

    least_stages: int = 1
    most_stages: int | None = 1
    v_shaped: bool = False
    splits_backward: bool = False


SCHEDULES = {
    "gpipe": ScheduleTraits(),
    "1f1b": ScheduleTraits(),
    "interleaved_1f1b": ScheduleTraits(2, None),
    "interleaved_zero_bubble": ScheduleTraits(2, None, splits_backward=True),
    "zbv": ScheduleTraits(2, 2, v_shaped=True, splits_backward=True),
    "dualpipev": ScheduleTraits(2, 2, v_shaped=True, splits_backward=True),
}


def micro_batches_fit(schedule: str, pp: int, num_micro_batches: int) -> bool:
    """Whether a schedule runs so many micro-batches: the conditions of torch's schedule classes."""
    if schedule == "1f1b":
        return num_micro_batches >= pp
    if schedule == "dualpipev":
        return num_micro_batches >= 2 * pp
    if schedule.startswith("interleaved"):
        return num_micro_batches % max(1, num_micro_batches // pp) == 0
    return True


def num_stages(parallel: ParallelConfig) -> int:
    return parallel.pp * parallel.stages_per_rank


def rank_of_stage(parallel: ParallelConfig, stage: int) -> int:
    """Pipeline rank that runs a stage: in turn, or down one side of a V and up the other."""
    turn, rank = divmod(stage, parallel.pp)
    return parallel.pp - 1 - rank if turn and SCHEDULES[parallel.pp_schedule].v_shaped else rank


def own_stages(parallel: ParallelConfig, pp_rank: int) -> list[int]:
    """Stages of a pipeline rank, ascending."""
    return [stage for stage in range(num_stages(parallel)) if rank_of_stage(parallel, stage) == pp_rank]


def stage_blocks(config: RunConfig) -> list[range]:
    """Blocks of each stage: as ``parallel.stage_layers`` says, or so that the slowest stage is as fast as can be."""
    sizes = config.parallel.stage_layers or _balanced(config.model, config.data.seq_len, num_stages(config.parallel))
    return [range(a, b) for a, b in pairwise(accumulate(sizes, initial=0))]


def block_costs(model: ModelConfig, seq_len: int) -> tuple[float, float, float]:
    """Forward operations per token of the embedding, one block, and the head with its loss.

    A block's attention counts half its products: it is causal. The embedding multiplies nothing, but copies a
    row and, backward, adds one: counted as two operations an element.
    """
    last = model.num_layers - 1
    block = 2 * block_parameters(model, last, active=True) + 2 * model.hidden_size * seq_len
    return 4.0 * model.hidden_size, float(block), 2.0 * model.vocab_size * model.hidden_size


def _balanced(model: ModelConfig, seq_len: int, stages: int) -> list[int]:
    """Blocks go one by one to the stage that is the least slow with it; each stage has one at least."""
    embedding, block, head = block_costs(model, seq_len)
    sizes, costs = [1] * stages, [block] * stages
    costs[0] += embedding
    costs[-1] += head
    for _ in range(model.num_layers - stages):
        least = min(range(stages), key=costs.__getitem__)
        sizes[least] += 1
        costs[least] += block
    return sizes
