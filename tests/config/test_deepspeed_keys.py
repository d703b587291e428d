"""Extra DeepSpeed keys: the documented few pass, everything else is refused with the field to set instead."""

from typing import Any

import pytest

from megatrain.config.deepspeed import DEEPSPEED_BUCKET, deepspeed_config
from megatrain.config.deepspeed_keys import ALLOWED, forbidden_keys, kind_of
from megatrain.config.derive import num_parameters
from megatrain.config.problems import Problem
from megatrain.config.schema import ParallelConfig, RunConfig

GOOD: dict[type, Any] = {bool: True, int: 1000, str: "flops.txt", list: ["all_reduce"]}


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


def test_a_section_wants_keys() -> None:
    (problem,) = problems_of("comms_logger", True)
    assert "enabled" in problem.allowed and problem.cure == "put its keys below it"


def test_bounds() -> None:
    assert problems_of("flops_profiler.module_depth", -1) == []
    assert problems_of("flops_profiler.module_depth", -2)
    assert problems_of("flops_profiler.profile_step", -1)
    assert problems_of("zero_optimization.reduce_bucket_size", 0)
    assert problems_of("comms_logger.prof_ops", [1])


def test_a_bucket_holds_no_more_than_all_gradients() -> None:
    config = RunConfig(parallel=ParallelConfig(dp=1), deepspeed={})
    bucket = deepspeed_config(config)["zero_optimization"]["reduce_bucket_size"]
    assert bucket == num_parameters(config.model) < DEEPSPEED_BUCKET
    large = config.model_copy(update={"model": config.model.model_copy(update={"num_layers": 10_000})})
    assert deepspeed_config(large)["zero_optimization"]["reduce_bucket_size"] == DEEPSPEED_BUCKET
    own = RunConfig(parallel=ParallelConfig(dp=1), deepspeed={"zero_optimization": {"reduce_bucket_size": 1000}})
    assert deepspeed_config(own)["zero_optimization"]["reduce_bucket_size"] == 1000
