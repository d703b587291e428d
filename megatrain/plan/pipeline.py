"""When each pipeline rank does what, if a forward, an input gradient and a weight gradient take given times."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatrain.config.schema import ParallelConfig
from megatrain.config.stages import num_stages
from megatrain.parallel.schedules import Action, rank_actions

UNIT_COSTS: Mapping[str, float] = {"F": 1.0, "I": 1.0, "W": 1.0}


@dataclass(frozen=True)
class Span:
    """One action of a rank, from ``start`` to ``end``."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What each rank does and when: ``ranks[r]`` in order of time. ``theory`` is the idle share by formula."""

    schedule: str
    num_micro_batches: int
    ranks: list[list[Span]]
    theory: float

    @property
    def duration(self) -> float:
        return max(span.end for spans in self.ranks for span in spans)

    @property
    def bubble(self) -> float:
        """Idle share of the busiest window: from a rank's first action to its last, the longest of all ranks.

        A rank that begins late may also end late, and its next step begins as much later.
        """
        longest = max(self.ranks, key=lambda spans: spans[-1].end - spans[0].start)
        busy = sum(span.end - span.start for span in longest)
        return 1.0 - busy / (longest[-1].end - longest[0].start)


def timeline(parallel: ParallelConfig, num_micro_batches: int, costs: Mapping[str, float] = UNIT_COSTS) -> Timeline:
    """The schedule of a layout with the given times of F, I and W on every stage; messages take no time."""
    costs = {**costs, "B": costs["I"] + costs["W"]}
    ranks = timed(rank_actions(parallel, num_micro_batches), num_stages(parallel), costs)
    return Timeline(parallel.pp_schedule, num_micro_batches, ranks, theory(parallel, num_micro_batches, costs))


def timed(orders: list[list[Action]], stages: int, costs: Mapping[str, float]) -> list[list[Span]]:
    """Starts every action as soon as its rank and what it waits for are ready.

    Raises:
        ValueError: the orders wait for each other.
    """
    ended: dict[tuple[str, int, int], float] = {}
    ranks: list[list[Span]] = [[] for _ in orders]
    while any(len(spans) < len(order) for spans, order in zip(ranks, orders, strict=True)):
        moved = False
        for spans, order in zip(ranks, orders, strict=True):
            while len(spans) < len(order):
                action = order[len(spans)]
                needed = _needs(action, stages)
                if needed is not None and needed not in ended:
                    break
                start = max(spans[-1].end if spans else 0.0, ended[needed] if needed is not None else 0.0)
                end = start + costs[action.kind]
                spans.append(Span(action, start, end))
                ended[_key(action)] = end
                moved = True
        if not moved:
            raise ValueError("the schedule's ranks wait for each other")
    return ranks


def theory(parallel: ParallelConfig, num_micro_batches: int, costs: Mapping[str, float] = UNIT_COSTS) -> float:
    """Idle share by the papers' formulas, for v stages on a rank, each as slow as the next.

    GPipe and 1F1B: (p - 1) (F + I + W), Huang et al. 2019; interleaved: the same beside v times the work,
    Narayanan et al. 2021; zero bubble: (p - 1) (F + I - W), Qi et al. 2023; ZBV: none while F = I = W, ibid.
    DualPipeV: as zero bubble, because torch runs its overlapped forward and backward one after the other.
    """
    F, I, W = costs["F"], costs["I"], costs["W"]  # noqa: E741 - the papers' letters
    lost = {
        "gpipe": F + I + W,
        "1f1b": F + I + W,
        "interleaved_1f1b": F + I + W,
        "interleaved_zero_bubble": F + I - W,
        "zbv": 0.0,
        "dualpipev": F + I - W,
    }[parallel.pp_schedule]
    idle = (parallel.pp - 1) * lost
    return idle / (idle + num_micro_batches * parallel.stages_per_rank * (F + I + W))


def _key(action: Action) -> tuple[str, int, int]:
    kind = "I" if action.kind == "B" else action.kind
    return kind, action.stage, action.micro_batch


def _needs(action: Action, stages: int) -> tuple[str, int, int] | None:
    """What must have ended elsewhere; a rank's own order sees to the rest."""
    kind, stage, micro_batch = _key(action)
    if kind == "F":
        return ("F", stage - 1, micro_batch) if stage > 0 else None
    if kind == "I":
        return ("I", stage + 1, micro_batch) if stage < stages - 1 else ("F", stage, micro_batch)
    return ("I", stage, micro_batch)
