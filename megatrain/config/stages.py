"""Pipeline stages as arithmetic: which rank runs them, and which blocks they hold.

A stage is as slow as its work: the head multiplies by the whole vocabulary, so its stage gets fewer blocks, and a
block with experts is not as slow as a dense one. This evens out the slowest stage and not the number of blocks.
"""

from itertools import accumulate, pairwise

from megatrain.config.pipeline_schedules import PIPELINE_SCHEDULES
from megatrain.config.schema import ParallelConfig, RunConfig
from megatrain.spec.counts import block_parameters, seen_on_average
from megatrain.spec.derive import resolve_model
from megatrain.spec.schema import ModelSpec


def num_stages(parallel: ParallelConfig) -> int:
    return parallel.pp * parallel.stages_per_rank


def rank_of_stage(parallel: ParallelConfig, stage: int) -> int:
    """Pipeline rank that runs a stage: in turn, or down one side of a V and up the other."""
    turn, rank = divmod(stage, parallel.pp)
    return parallel.pp - 1 - rank if turn and PIPELINE_SCHEDULES[parallel.pp_schedule].v_shaped else rank


def own_stages(parallel: ParallelConfig, pp_rank: int) -> list[int]:
    """Stages of a pipeline rank, ascending."""
    return [stage for stage in range(num_stages(parallel)) if rank_of_stage(parallel, stage) == pp_rank]


def stage_blocks(config: RunConfig) -> list[range]:
    """Blocks of each stage: as ``parallel.stage_layers`` says, or so that the slowest stage is as fast as can be."""
    costs = stage_costs(resolve_model(config.model), config.data.seq_len)
    sizes = config.parallel.stage_layers or _balanced(costs, num_stages(config.parallel))
    return [range(a, b) for a, b in pairwise(accumulate(sizes, initial=0))]


def stage_costs(model: ModelSpec, seq_len: int) -> list[float]:
    """Forward operations per token of each block; the first also embeds, the last has the head and its loss.

    A causal block's attention counts half its products, which is what it sees. Of experts those that a token visits
    count. The embedding multiplies nothing, but copies a row and, backward, adds one: counted as two operations an
    element.
    """
    costs = [
        2.0 * block_parameters(model, layer, active=True) + _attention(model, layer, seq_len)
        for layer in range(model.num_layers)
    ]
    costs[0] += 4.0 * model.hidden_size
    costs[-1] += 2.0 * model.vocab_size * model.hidden_size
    if model.head_transform:
        costs[-1] += 2.0 * model.hidden_size**2
    return costs


def _attention(model: ModelSpec, layer: int, seq_len: int) -> float:
    """Forward operations per token of a block's attention: 4 H K for each position that it sees on average."""
    return 4.0 * model.attention.num_heads * model.attention.head_width * seen_on_average(model, layer, seq_len)


def _balanced(costs: list[float], stages: int) -> list[int]:
    """Blocks of each stage, one at least: with the least slowest stage, of those plans the most even one.

    Plans of the first stages are kept by the number of their blocks, the best of each.
    """
    sums = [0.0, *accumulate(costs)]
    most = sums[-1] / stages + max(costs)  # taking blocks until a stage reaches its share exceeds it by one at most
    plans: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [])}
    for _ in range(stages):
        longer: dict[int, tuple[float, float, list[int]]] = {}
        for start, (slowest, squares, sizes) in plans.items():
            for end in range(start + 1, len(costs) + 1):
                cost = sums[end] - sums[start]
                if cost > most:
                    break
                plan = (max(slowest, cost), squares + cost * cost, [*sizes, end - start])
                longer[end] = min(longer.get(end, plan), plan)
        plans = longer
    return plans[len(costs)][2]
