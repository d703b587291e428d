"""Which stage stands where, and which blocks it holds."""

from typing import Any

import pytest

from megatrain.config.schema import ParallelConfig, RunConfig
from megatrain.config.stages import SCHEDULES, block_costs, own_stages, stage_blocks


def config(**sections: dict[str, Any]) -> RunConfig:
    return RunConfig.model_validate(sections)


def sizes(num_layers: int, pp: int, **parallel: Any) -> list[int]:
    blocks = stage_blocks(config(model={"num_layers": num_layers}, parallel={"pp": pp, **parallel}))
    assert [layer for stage in blocks for layer in stage] == list(range(num_layers))
    return [len(stage) for stage in blocks]


def test_stages_go_round_or_down_and_up() -> None:
    looped = ParallelConfig(pp=3, stages_per_rank=2, pp_schedule="interleaved_1f1b")
    assert [own_stages(looped, rank) for rank in range(3)] == [[0, 3], [1, 4], [2, 5]]
    for schedule in ("zbv", "dualpipev"):
        bent = looped.model_copy(update={"pp_schedule": schedule})
        assert [own_stages(bent, rank) for rank in range(3)] == [[0, 5], [1, 4], [2, 3]]


@pytest.mark.parametrize(("num_layers", "pp", "expected"), [(8, 4, [2, 3, 2, 1]), (3, 3, [1, 1, 1]), (5, 1, [5])])
def test_the_head_takes_the_place_of_blocks(num_layers: int, pp: int, expected: list[int]) -> None:
    """The default model's head costs more than two of its blocks, the embedding nearly nothing."""
    assert sizes(num_layers, pp) == expected


def test_no_other_split_has_a_faster_slowest_stage() -> None:
    run = config(model={"num_layers": 9, "vocab_size": 3000}, parallel={"pp": 3})
    embedding, block, head = block_costs(run.model, run.data.seq_len)

    def slowest(first: int, second: int, third: int) -> float:
        return max(embedding + first * block, second * block, third * block + head)

    splits = [(a, b, 9 - a - b) for a in range(1, 8) for b in range(1, 9 - a)]
    first, second, third = (len(stage) for stage in stage_blocks(run))
    assert slowest(first, second, third) == min(slowest(*split) for split in splits)


def test_a_list_is_taken_as_it_is() -> None:
    assert sizes(6, 3, stage_layers=[1, 4, 1]) == [1, 4, 1]


def test_every_schedule_of_the_schema_is_described() -> None:
    assert set(ParallelConfig.model_json_schema()["properties"]["pp_schedule"]["enum"]) == set(SCHEDULES)
