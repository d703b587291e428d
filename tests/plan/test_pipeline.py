"""Timelines of pipeline schedules: every action once, nothing before what it needs, and the idle share of theory."""

import pytest

from megatrain.config.schema import ParallelConfig
from megatrain.config.stages import SCHEDULES, num_stages, rank_of_stage
from megatrain.parallel.schedules import Action, rank_actions
from megatrain.plan.draw import as_png, as_text
from megatrain.plan.pipeline import Timeline, place, timeline

UNIT = {"F": 1.0, "I": 1.0, "W": 1.0, "B": 2.0}


def layout(schedule: str, pp: int) -> ParallelConfig:
    stages = max(1, SCHEDULES[schedule].least_stages)
    return ParallelConfig.model_validate({"pp": pp, "pp_schedule": schedule, "stages_per_rank": stages})


@pytest.mark.parametrize("pp", [2, 5])
@pytest.mark.parametrize("schedule", SCHEDULES)
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


@pytest.mark.parametrize("factor", [2, 8])
@pytest.mark.parametrize("pp", [2, 5])
@pytest.mark.parametrize("schedule", SCHEDULES)
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
        place(orders, 2, UNIT)


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
