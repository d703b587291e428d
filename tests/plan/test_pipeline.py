"""Timelines of pipeline schedules: every action once, nothing before what it needs, and the idle share of theory."""

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops

from megatrain.config.pipeline_schedules import PIPELINE_SCHEDULES
from megatrain.config.schema import ParallelConfig
from megatrain.config.stages import num_stages, rank_of_stage
from megatrain.parallel.schedules import Action, rank_actions
from megatrain.plan.draw import as_png, as_text
from megatrain.plan.pipeline import Timeline, timed, timeline

PAGE = Path(__file__).parents[2] / "docs/pipeline.md"
UNIT = {"F": 1.0, "I": 1.0, "W": 1.0, "B": 2.0}


def layout(schedule: str, pp: int) -> ParallelConfig:
    stages = max(1, PIPELINE_SCHEDULES[schedule].least_stages)
    return ParallelConfig.model_validate({"pp": pp, "pp_schedule": schedule, "stages_per_rank": stages})


@pytest.mark.parametrize("pp", [2, 5])
@pytest.mark.parametrize("schedule", PIPELINE_SCHEDULES)
def test_all_work_is_done_once_where_the_stages_stand(schedule: str, pp: int) -> None:
    parallel, num_micro_batches = layout(schedule, pp), 2 * pp
    done = set()
    for rank, actions in enumerate(rank_actions(parallel, num_micro_batches)):
        for action in actions:
            assert rank_of_stage(parallel, action.stage) == rank
            for kind in "IW" if action.kind == "B" else action.kind:
                assert (kind, action.stage, action.micro_batch) not in done
                done.add((kind, action.stage, action.micro_batch))
    assert len(done) == 3 * num_stages(parallel) * num_micro_batches


@pytest.mark.parametrize("name", PIPELINE_SCHEDULES)
def test_torch_takes_and_refuses_what_the_table_says(name: str) -> None:
    """Its classes raise a ValueError where numbers of stages or micro-batches don't fit."""
    schedule = PIPELINE_SCHEDULES[name]
    for pp in (2, 3, 4):
        for number in range(1, 13):
            taken = schedule.takes_micro_batches(number, pp)
            with nullcontext() if taken else pytest.raises(ValueError):
                get_schedule_ops(schedule.torch_name, pp, number, schedule.least_stages)


def test_the_page_says_what_the_table_says() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\d[^|]*) \| ([^|]+) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    described = {name: (one.stages_in_words, one.micro_batches_in_words) for name, one in PIPELINE_SCHEDULES.items()}
    assert {name: (stages, micro_batches) for name, stages, micro_batches in rows} == described


@pytest.mark.parametrize("factor", [2, 8])
@pytest.mark.parametrize("pp", [2, 5])
@pytest.mark.parametrize("schedule", PIPELINE_SCHEDULES)
def test_idle_share_is_that_of_theory(schedule: str, pp: int, factor: int) -> None:
    drawn = timeline(layout(schedule, pp), factor * pp)
    assert drawn.bubble == pytest.approx(drawn.theory, abs=1e-12)


def test_theory_holds_for_other_times() -> None:
    zero_bubble = layout("interleaved_zero_bubble", 4)
    drawn = timeline(zero_bubble, 16, {"F": 1.0, "I": 1.5, "W": 0.75})
    assert drawn.bubble == pytest.approx(drawn.theory, abs=1e-12)
    assert drawn.bubble != pytest.approx(timeline(zero_bubble, 16).bubble)


def test_an_order_that_cannot_run_is_seen() -> None:
    orders = [[Action("F", 0, 0), Action("B", 0, 0)], [Action("B", 1, 0), Action("F", 1, 0)]]
    with pytest.raises(ValueError, match="wait for each other"):
        timed(orders, 2, UNIT)


def test_text_of_1f1b() -> None:
    assert as_text(timeline(layout("1f1b", 2), 2)).splitlines()[:3] == [
        "1f1b: 2 ranks, 2 micro-batches, 9 units of time; idle 33.33 % (theory 33.33 %)",
        "rank 0   F0 F1 .. .. B0 B0 .. B1 B1",
        "rank 1   .. F0 B0 B0 F1 B1 B1 .. ..",
    ]


def test_picture_has_the_colours_of_the_work(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from PIL import Image

    drawn: Timeline = timeline(layout("zbv", 2), 4)
    as_png(drawn, tmp_path / "zbv.png")
    image = Image.open(tmp_path / "zbv.png")
    colours = {colour for _, colour in image.getcolors(1 << 20)}
    assert {(90, 140, 220), (60, 170, 150), (120, 190, 90)} <= colours
    assert image.width > 22 * drawn.duration
