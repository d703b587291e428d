"""Values of a run that follow from others: defaults that depend on the model, the layout or the world."""

import math

from megatrain.config.schema import ParallelConfig, ResolvedParallel, ResolvedRun, RunConfig
from megatrain.spec.derive import resolve_model


def resolve(config: RunConfig, world_size: int) -> ResolvedRun:
    """``config`` with every derived field filled in, for a run of ``world_size`` ranks.

    The config must have passed ``rules.check`` with that world size.
    """
    parallel, schedule = config.parallel, config.schedule
    dp = parallel.dp or world_size // ranks_of_a_copy(parallel)
    return ResolvedRun.model_construct(
        **dict(config)
        | {
            "model": resolve_model(config.model),
            "parallel": ResolvedParallel.model_construct(**dict(parallel) | {"dp": dp}),
            "schedule": schedule.model_copy(update={"decay_steps": decay_steps(config)}),
        }
    )


def ranks_of_a_copy(parallel: ParallelConfig) -> int:
    """Ranks that share one copy of the model and its sequences."""
    return parallel.tp * parallel.cp * parallel.pp


def num_ranks(parallel: ParallelConfig) -> int:
    """Ranks that a layout takes; where ``dp`` is open, those of one copy of the model."""
    return ranks_of_a_copy(parallel) * (parallel.dp or 1)


def decay_steps(config: RunConfig) -> int | None:
    """Steps of the decay, as `schedule.decay_steps` describes them; None where the schedule has no such number."""
    schedule = config.schedule
    if schedule.decay_steps is not None:
        return schedule.decay_steps
    if schedule.name in ("cosine", "linear"):
        return config.train.steps
    return math.ceil(config.train.steps / 10) if schedule.name == "wsd" else None


def data_parallel_rank(parallel: ResolvedParallel, rank: int) -> int:
    """Place of a rank among those that read different sequences: ranks count tp first, then cp, dp and pp."""
    return rank // (parallel.tp * parallel.cp) % parallel.dp


def data_parallel_size(config: RunConfig, world_size: int | None) -> int | None:
    """dp, where it is set or follows from ``world_size``; None where it does not."""
    parallel = config.parallel
    if parallel.dp is not None or world_size is None:
        return parallel.dp
    dp, left_over = divmod(world_size, ranks_of_a_copy(parallel))
    return dp if dp and not left_over else None


def grad_accum_steps(config: ResolvedRun) -> int:
    """Micro-batches of a rank in one step."""
    return config.train.global_batch_size // (config.train.micro_batch_size * config.parallel.dp)


def tokens_per_step(config: RunConfig) -> int:
    """Tokens of one global batch."""
    return config.train.global_batch_size * config.data.seq_len
