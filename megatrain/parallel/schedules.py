"""The order of a pipeline schedule's actions, as torch's own schedule objects give it; no processes."""

from typing import NamedTuple

from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

from megatrain.config.schema import ParallelConfig

TORCH_NAMES = {
    "gpipe": "GPipe",
    "1f1b": "1F1B",
    "interleaved_1f1b": "Interleaved1F1B",
    "interleaved_zero_bubble": "InterleavedZeroBubble",
    "zbv": "ZBVZeroBubble",
    "dualpipev": "DualPipeV",
}
"""Our names of the schedules -> those of ``torch.distributed.pipelining``."""


class Action(NamedTuple):
    """One piece of work: ``kind`` is F (forward), B (whole backward), I (input gradient) or W (weight gradient)."""

    kind: str
    stage: int
    micro_batch: int


def rank_actions(parallel: ParallelConfig, num_micro_batches: int) -> list[list[Action]]:
    """What each pipeline rank does, in order. An overlapped forward and backward counts as one after the other."""
    orders = get_schedule_ops(
        TORCH_NAMES[parallel.pp_schedule], parallel.pp, num_micro_batches, parallel.stages_per_rank
    )
    return [[part for action in order if action is not None for part in _parts(action)] for order in orders]


def _parts(action) -> list[Action]:  # type: ignore[no-untyped-def]
    if action.sub_actions:
        return [part for sub in action.sub_actions for part in _parts(sub)]
    kind = action.computation_type.value
    return [Action(kind, action.stage_index, action.microbatch_index)] if kind in ("F", "B", "I", "W") else []
