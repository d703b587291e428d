"""Which stage stands where, and which blocks it holds."""

from typing import Any

import pytest

from megatrain.config.pipeline_schedules import PIPELINE_SCHEDULES
from megatrain.config.schema import ParallelConfig, RunConfig
from megatrain.config.stages import own_stages, stage_blocks, stage_costs
from megatrain.spec.derive import resolve_model
from tests.configs import model_spec, run_config_of


def config(**sections: dict[str, Any]) -> RunConfig:
    return run_config_of(sections)


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


@pytest.mark.parametrize(("num_layers", "pp", "expected"), [(8, 4, [2, 2, 3, 1]), (3, 3, [1, 1, 1]), (5, 1, [5])])
def test_the_head_takes_the_place_of_blocks(num_layers: int, pp: int, expected: list[int]) -> None:
    """The default model's head costs more than two of its blocks, the embedding nearly nothing."""
    assert sizes(num_layers, pp) == expected


@pytest.mark.parametrize(
    "model",
    [
        {"vocab_size": 3000},
        {"experts.num_experts": 8, "experts.per_token": 4, "experts.interval": 3, "vocab_size": 64},
        {
            "experts.num_experts": 8,
            "experts.num_dense_layers": 5,
            "feed_forward.hidden_size": 4096,
            "experts.hidden_size": 64,
        },
    ],
)
def test_no_other_split_has_a_faster_slowest_stage(model: dict[str, Any]) -> None:
    run = config(model={"num_layers": 9, "vocab_size": 3000, **model}, parallel={"pp": 3})
    costs = stage_costs(resolve_model(run.model), run.data.seq_len)

    def slowest(a: int, b: int) -> float:
        return max(sum(costs[:a]), sum(costs[a:b]), sum(costs[b:]))

    first, second, _ = stage_blocks(run)
    assert slowest(first.stop, second.stop) == min(slowest(a, b) for b in range(2, 9) for a in range(1, b))


@pytest.mark.parametrize("window", [1, 16, 60, 64, 500])
def test_a_block_costs_what_its_window_sees(window: int) -> None:
    """4 H K for each pair; counted pair by pair, where the first tokens see less than a window."""
    shape = {"num_layers": 1, "attention.num_heads": 2, "attention.head_width": 3, "attention.window": window}
    costs = {
        kind: stage_costs(model_spec({**shape, "blocks": [kind], "hidden_size": 8, "vocab_size": 10}), 64)[0]
        for kind in ("full", "window")
    }
    pairs = sum(min(place, window) for place in range(1, 65)) - sum(range(1, 65))
    assert costs["window"] - costs["full"] == pytest.approx(4 * 2 * 3 * pairs / 64, abs=4 * 2 * 3 / 2)


def test_a_deep_model_of_unequal_blocks_is_split_evenly() -> None:
    model = {"num_layers": 128, "experts.num_experts": 8, "experts.interval": 2, "vocab_size": 64}
    run = config(model=model, parallel={"pp": 32})
    assert {len(stage) for stage in stage_blocks(run)[1:-1]} == {4}


def test_a_list_is_taken_as_it_is() -> None:
    assert sizes(6, 3, stage_layers=[1, 4, 1]) == [1, 4, 1]


def test_every_schedule_of_the_schema_is_described() -> None:
    assert set(ParallelConfig.model_json_schema()["properties"]["pp_schedule"]["enum"]) == set(PIPELINE_SCHEDULES)
