"""Every rule between fields: what it forbids, what it says, and that it reads only what it declares."""

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from megatrain.config.load import load_config
from megatrain.config.reading.problems import ConfigError, Problem
from megatrain.config.rules.check import RULES, check, check_ready_to_train
from megatrain.config.schema import RunConfig
from tests.config.rule_cases import CASES
from tests.configs import run_config_of

ALLOWED = [
    (
        'data.train={"a":"x","b":{"path":"y","weight":"1/3"}} data.validation={"a":"z"} train.steps=9 '
        'data.weight_schedule=[{"from_sample":5,"weights":{"b":0}}]',
        None,
    ),
    (
        'train.ramp=[{"until_step":5,"global_batch_size":4,"seq_len":64},{"until_step":9,"seq_len":128}] '
        "data.seq_len=256",
        None,
    ),
    ("model.family=gpt model.hidden_size=9 model.attention.num_heads=3", None),
    ("model.attention.head_width=10 model.attention.num_heads=7", None),
    ("model.family=gpt model.attention.head_width=7", None),
    ("schedule.decay_steps=1000", None),  # a long schedule, stopped early
    ("schedule.warmup_steps=100", None),
    ("schedule.name=constant schedule.warmup_steps=90", None),
    ("schedule.warmup_steps=150", None),  # cut to the run, with a note
    ("schedule.name=wsd schedule.warmup_steps=50 schedule.decay_steps=60", None),
    ('train.ramp=[{"until_step":150}]', None),
    ("schedule.name=wsd schedule.warmup_steps=90", None),
    ("parallel.tp=2 parallel.sequence_parallel=true parallel.dp=2", 4),
    (
        "parallel.cp=2 data.seq_len=250 parallel.cp_method=ulysses parallel.ep=4 parallel.dp=2 "
        "model.experts.num_experts=8",
        4,
    ),
    (
        "model.experts.num_experts=8 model.router.groups=4 model.router.groups_per_token=2 model.experts.per_token=4",
        None,
    ),
    ("model.experts.num_experts=8 model.experts.per_token=1 model.router.normalize=false", None),
    (
        "model.experts.num_experts=1 model.experts.per_token=1 model.router.normalize=false model.router.score=sigmoid",
        None,
    ),
    (
        "model.experts.num_experts=8 model.experts.num_shared=2 model.experts.num_dense_layers=1 "
        "model.experts.capacity=1.25",
        None,
    ),
    ("parallel.pp=4 train.global_batch_size=4", 4),
    ("parallel.pp=2 parallel.stages_per_rank=2 parallel.pp_schedule=interleaved_1f1b train.global_batch_size=3", 2),
    (  # torch's own example: 10 micro-batches on 4 ranks make 2 rounds of 5
        "parallel.pp=4 parallel.stages_per_rank=2 parallel.pp_schedule=interleaved_1f1b train.global_batch_size=10 "
        "model.num_layers=8",
        4,
    ),
    ("parallel.pp=2 parallel.stage_layers=[1,3]", 2),
    ("parallel.pp=4 parallel.pp_schedule=gpipe train.global_batch_size=1", 4),
    ("parallel.pp=2 parallel.stages_per_rank=2 parallel.pp_schedule=zbv train.global_batch_size=1", 2),
    ("precision.dtype=fp16 precision.initial_loss_scale=1 precision.min_loss_scale=1", None),
]


def problems_of(overrides: str, world_size: int | None = None) -> list[Problem]:
    try:
        load_config([], [f"--{override}" for override in overrides.split()], world_size)
    except ConfigError as error:
        return error.problems
    return []


@pytest.mark.parametrize(("overrides", "world_size", "key", "value", "message", "cure"), CASES)
def test_a_rule_says_what_is_wrong(
    overrides: str, world_size: int | None, key: str, value: Any, message: str, cure: str
) -> None:
    (problem,) = problems_of(overrides, world_size)
    assert (problem.key, problem.value) == (key, value)
    assert message in problem.message
    assert cure in problem.cure
    assert problem.allowed and problem.origin in ("command line", "default", "derived")
    if f"{key}=" in overrides:
        assert problem.origin == "command line"


@pytest.mark.parametrize(("overrides", "world_size"), ALLOWED)
def test_what_is_sound_passes(overrides: str, world_size: int | None) -> None:
    assert problems_of(overrides, world_size) == []


@pytest.mark.parametrize(
    ("overrides", "first", "second", "allowed"),
    [
        (
            "model.experts.num_experts=6 parallel.ep=4",
            "model.experts.num_experts = 6",
            "parallel.ep = 4",
            "multiples of 4",
        ),
        ("data.seq_len=250 parallel.cp=2", "data.seq_len = 250", "parallel.cp = 2 × 2", "multiples of 4"),
        (
            "model.attention.num_heads=8 parallel.cp=3 parallel.cp_method=ulysses data.seq_len=255",
            *("model.attention.num_heads = 8", "parallel.cp = 3", "multiples of 3"),
        ),
        (
            "parallel.pp=2 parallel.pp_schedule=zbv model.num_layers=8 parallel.stages_per_rank=3",
            *("parallel.stages_per_rank = 3", "parallel.pp_schedule = zbv", "1 with gpipe and 1f1b; 2 with zbv and"),
        ),
        (
            "model.experts.num_experts=4 model.experts.per_token=5",
            *("model.experts.per_token = 5", "model.experts.num_experts = 4", "1 to 4"),
        ),
        (
            "model.experts.num_experts=4 model.experts.capacity=0",
            *("model.experts.capacity = 0", "model.experts.num_experts = 4", "above 0, or null for no limit"),
        ),
        (
            "offload.optimizer=nvme parallel.zero_stage=3",
            *("offload.nvme_path = null", "offload.optimizer = nvme", "a folder on a local disk"),
        ),
    ],
)
def test_bad_input_names_both_fields_and_what_is_allowed(overrides: str, first: str, second: str, allowed: str) -> None:
    (problem,) = problems_of(overrides)
    header, message, allowed_line, _ = str(problem).split("\n    ")
    assert header.startswith(first), problem
    assert second in message, problem
    assert allowed_line.startswith(f"allowed: {allowed}"), problem


def test_a_run_without_data_is_valid_but_not_ready() -> None:
    (problem,) = check_ready_to_train(RunConfig(), has_file=True)
    assert problem.key == "data.train" and "tokenize_text.py" in problem.cure
    assert check_ready_to_train(run_config_of({"data": {"train": "data/x"}}), has_file=False) == []


class Watched:
    """Stands for a config and notes which dotted keys are read."""

    def __init__(self, inner: BaseModel, prefix: str, seen: set[str]):
        self._inner, self._prefix, self._seen = inner, prefix, seen

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if isinstance(value, BaseModel):
            return Watched(value, f"{self._prefix}{name}.", self._seen)
        self._seen.add(self._prefix + name)
        return value


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.function.__name__)
def test_a_rule_reads_only_what_it_declares_and_has_a_case(rule: Any) -> None:
    seen: set[str] = set()
    found = 0
    for overrides, world_size, *_ in [*CASES, *ALLOWED]:
        values: dict[str, Any] = {}
        for override in overrides.split():
            key, _, text = override.partition("=")
            section, _, name = key.partition(".")
            value: Any = int(text) if text.isdigit() else {"true": True, "false": False}.get(text, text)
            value = json.loads(text) if text.startswith(("[", "{")) else value
            value = float(text) if re.fullmatch(r"\d+\.\d+", text) else value
            values.setdefault(section, {})[name] = value
        config = run_config_of(values)
        watched: Any = Watched(config, "", seen)
        found += len(list(rule.function(watched, world_size)))
    assert seen == set(rule.reads)
    assert found


def test_unusable_keys_silence_the_rules_that_read_them() -> None:
    config = run_config_of({"model": {"attention.num_heads": 7}, "data": {"seq_len": 5000}})
    assert {problem.key for problem in check(config)} == {"model.attention.num_heads", "data.seq_len"}
    assert {problem.key for problem in check(config, unusable={"model.attention.num_heads"})} == {"data.seq_len"}
    assert check(config, unusable={"model"}) == []


sizes = st.integers(1, 24)


@settings(max_examples=100, deadline=None)
@given(batch=sizes, micro=sizes, pp=st.integers(1, 4), dp=st.integers(1, 4), interleaved=st.booleans())
def test_the_sizes_that_a_cure_names_are_cures(batch: int, micro: int, pp: int, dp: int, interleaved: bool) -> None:
    parallel: dict[str, Any] = {"pp": pp, "dp": dp}
    if interleaved and pp > 1:
        parallel |= {"stages_per_rank": 2, "pp_schedule": "interleaved_1f1b"}

    def batch_problems(size: int) -> list[Problem]:
        train = {"global_batch_size": size, "micro_batch_size": micro}
        model = {"num_layers": 8}
        return check(run_config_of({"model": model, "parallel": parallel, "train": train}), pp * dp)

    for problem in batch_problems(batch):
        assert problem.key == "train.global_batch_size"
        proposed = re.search(r"global_batch_size to ([0-9 or]+)", problem.cure)
        assert proposed is not None
        for size in re.findall(r"\d+", proposed[1]):
            # a size that divides may still be too small for the pipeline: then the next message says so
            assert {p.message.split()[0] for p in batch_problems(int(size))} <= {"makes"} - {problem.message.split()[0]}


@settings(max_examples=100, deadline=None)
@given(hidden_size=st.integers(1, 200), num_heads=st.integers(1, 40), family=st.sampled_from(["gpt", "llama"]))
def test_the_heads_that_are_allowed_are_allowed(hidden_size: int, num_heads: int, family: str) -> None:
    def head_problems(heads: int) -> list[Problem]:
        model = {"family": family, "hidden_size": hidden_size, "attention.num_heads": heads}
        return check(run_config_of({"model": model}))

    for problem in head_problems(num_heads):
        for heads in map(int, re.findall(r"\d+", problem.allowed.partition(" for ")[0])):
            assert all("must be even" in p.message for p in head_problems(heads))
