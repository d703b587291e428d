"""Extra DeepSpeed keys: the documented few pass, everything else is refused with the field to set instead."""

from typing import Any

import pytest

from megatrain.config.deepspeed import DEEPSPEED_BUCKET, deepspeed_config
from megatrain.config.derive import resolve
from megatrain.config.reading.problems import Problem
from megatrain.config.rules.compatibility import SETTINGS
from megatrain.config.rules.deepspeed_keys import ALLOWED, forbidden_keys, kind_of
from megatrain.config.schema import RunConfig
from megatrain.spec.counts import num_parameters

PRINTING = (
    *("wall_clock_breakdown", "memory_breakdown", "dump_state"),
    *(f"comms_logger.{name}" for name in ("enabled", "verbose", "prof_all", "prof_ops", "debug")),
)
"""Keys that tests/parallel/test_deepspeed_keys.py has on, all of them, and finds to change no bit."""
GOOD: dict[type, Any] = {bool: True, int: 1000, list: ["all_reduce"]}


def nested(dotted: str, value: Any) -> dict[str, Any]:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def problems_of(dotted: str, value: Any) -> list[Problem]:
    return list(forbidden_keys(RunConfig(deepspeed=nested(dotted, value))))


@pytest.mark.parametrize("key", ALLOWED)
def test_a_documented_key_takes_its_type_only(key: str) -> None:
    kind = ALLOWED[key][0]
    assert problems_of(key, GOOD[kind]) == []
    for other in (value for its_kind, value in GOOD.items() if its_kind is not kind):
        (problem,) = problems_of(key, other)
        assert (problem.key, problem.value, problem.allowed) == (f"deepspeed.{key}", other, kind_of(key))
        assert problem.cure == f"set deepspeed.{key} to {kind_of(key)}"


@pytest.mark.parametrize(
    ("key", "cure"),
    [
        ("train_batch_size", "set train.global_batch_size instead"),
        ("train_micro_batch_size_per_gpu", "set train.micro_batch_size instead"),
        ("gradient_accumulation_steps", "set train.global_batch_size and train.micro_batch_size instead"),
        ("gradient_clipping", "set optimizer.grad_clip instead"),
        ("optimizer", "set the section `optimizer` instead"),
        ("fp16", "set precision.dtype instead"),
        ("bf16", "set precision.dtype instead"),
        ("zero_optimization.stage", "set parallel.zero_stage instead"),
        ("managed_gradient_accumulation", "leave it out"),
        ("data_types", "set precision.gradient_dtype instead"),
        ("communication_data_type", "set precision.gradient_dtype instead"),
    ],
)
def test_a_derived_key_names_the_field_that_decides_it(key: str, cure: str) -> None:
    (problem,) = problems_of(key, {"enabled": True})
    assert (problem.key, problem.cure) == (f"deepspeed.{key}", cure)
    assert "megatrain derives" in problem.message


@pytest.mark.parametrize(
    ("key", "cure"),
    [
        ("wall_clock_brakdown", "did you mean deepspeed.wall_clock_breakdown?"),
        ("zero_optimization.overlap_com", "did you mean deepspeed.zero_optimization.overlap_comm?"),
        ("overlap_comm", "did you mean deepspeed.zero_optimization.overlap_comm?"),
        ("zero_optimization.offload_optimizer", "leave it out"),
        ("comms_logger.verbose.more", "set deepspeed.comms_logger.verbose to true or false"),
    ],
)
def test_an_unknown_key_gets_the_nearest(key: str, cure: str) -> None:
    (problem,) = problems_of(key, "x")
    assert problem.cure == cure
    assert problem.allowed


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("zero_optimization.round_robin_gradients", True, "another weight's numbers"),
        ("zero_optimization.contiguous_gradients", False, "experts"),
        ("zero_optimization.allgather_bucket_size", 1000, "does nothing"),
        ("flops_profiler", {"enabled": True}, "replaces torch's functions"),
    ],
)
def test_a_key_that_does_harm_says_which(key: str, value: Any, reason: str) -> None:
    (problem,) = problems_of(key, value)
    assert (problem.key, problem.value, problem.cure) == (f"deepspeed.{key}", value, "leave it out")
    assert reason in problem.message
    assert key.rpartition(".")[2] not in problem.allowed


def test_every_key_is_an_axis_or_only_prints() -> None:
    settings = {setting.key for setting in SETTINGS.values() if setting.key.startswith("deepspeed.")}
    assert settings | {f"deepspeed.{key}" for key in PRINTING} == {f"deepspeed.{key}" for key in ALLOWED}


def test_a_section_wants_keys() -> None:
    (problem,) = problems_of("comms_logger", True)
    assert "enabled" in problem.allowed and problem.cure == "put its keys below it"


def test_bounds() -> None:
    assert problems_of("zero_optimization.reduce_bucket_size", 0)
    assert problems_of("zero_optimization.sub_group_size", 0) == []
    assert problems_of("zero_optimization.sub_group_size", -1)
    assert problems_of("comms_logger.prof_ops", [1])


def test_a_bucket_holds_no_more_than_all_gradients() -> None:
    config = resolve(RunConfig(), 1)
    bucket = deepspeed_config(config)["zero_optimization"]["reduce_bucket_size"]
    assert bucket == num_parameters(config.model) < DEEPSPEED_BUCKET
    large = config.model_copy(update={"model": config.model.model_copy(update={"num_layers": 10_000})})
    assert deepspeed_config(large)["zero_optimization"]["reduce_bucket_size"] == DEEPSPEED_BUCKET
    own = resolve(RunConfig(deepspeed={"zero_optimization": {"reduce_bucket_size": 1000}}), 1)
    assert deepspeed_config(own)["zero_optimization"]["reduce_bucket_size"] == 1000
    own.deepspeed["zero_optimization"]["reduce_bucket_size"] = 10**12
    assert deepspeed_config(own)["zero_optimization"]["reduce_bucket_size"] == bucket
