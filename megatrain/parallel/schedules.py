"""The order of a pipeline schedule's actions, as torch's own schedule objects give it; no processes."""

from collections import Counter
from typing import Any, NamedTuple

from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

from megatrain.config.pipeline_schedules import PIPELINE_SCHEDULES
from megatrain.config.schema import ParallelConfig


class Action(NamedTuple):
    """One piece of work: ``kind`` is F (forward), B (whole backward), I (input gradient) or W (weight gradient)."""

    kind: str
    stage: int
    micro_batch: int


def rank_actions(parallel: ParallelConfig, num_micro_batches: int) -> list[list[Action]]:
    """What each pipeline rank does, in order. An overlapped forward and backward counts as one after the other."""
    orders = get_schedule_ops(
        PIPELINE_SCHEDULES[parallel.pp_schedule].torch_name, parallel.pp, num_micro_batches, parallel.stages_per_rank
    )
    return [_numbered(order) for order in orders]


def _numbered(order: list[Any]) -> list[Action]:
    """Every schedule takes a stage's micro-batches in turn; torch's own numbers of 1F1B are off by one on the last."""
    counts: Counter[tuple[str, int]] = Counter()
    actions = []
    for kind, stage in (part for action in order if action is not None for part in _parts(action)):
        direction = "F" if kind == "F" else "W" if kind == "W" else "I"
        actions.append(Action(kind, stage, counts[direction, stage]))
        counts[direction, stage] += 1
        if kind == "B":
            counts["W", stage] += 1
    return actions


def _parts(action: Any) -> list[tuple[str, int]]:
    if action.sub_actions:
        return [part for sub in action.sub_actions for part in _parts(sub)]
    kind = action.computation_type.value
    return [(kind, action.stage_index)] if kind in ("F", "B", "I", "W") else []
