"""The table of compatibility: every refused pair and what it says, and the questions that it answers."""

import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from megatrain.config.pages import compatibility_page
from megatrain.config.reading.fields import all_fields, value_at
from megatrain.config.reading.problems import ConfigError, Problem
from megatrain.config.rules.check import REFUSED_PAIRS, check
from megatrain.config.rules.combine import keys_of, read_features, refusal_of, refusals_of, values_left
from megatrain.config.rules.compatibility import CLASSES, REFUSALS, SETTINGS, Setting
from megatrain.config.rules.deepspeed_keys import ALLOWED
from megatrain.config.schema import RunConfig
from tests.config.test_rules import Watched
from tests.configs import run_config_of
from tests.covering import Feature, allowed_pairs, in_use, is_allowed, pairs, raw, sections

ROOT = Path(__file__).parents[2]
REFUSED = [pair for pair in pairs() if refusal_of(*pair)]
REFUSED_BY_OTHERS = [pair for pair in pairs() if not refusal_of(*pair) and not is_allowed(*pair)]


def problems_of(*features: Feature) -> list[Problem]:
    """Of a config that has ``features``, and what they need to do anything."""
    return check(run_config_of(sections(next(in_use(dict(features))))))


@pytest.mark.parametrize("pair", REFUSED, ids=lambda pair: "-".join(map("=".join, pair)))
def test_a_refused_pair_names_both_fields_the_reason_and_the_cure(pair: tuple[Feature, Feature]) -> None:
    refusal = refusal_of(*pair)
    assert refusal
    setting, other = refusal.setting, refusal.other
    features = dict(pair)
    (problem,) = [found for found in problems_of(*pair) if refusal.reason in found.message]
    assert problem.key == setting.key
    assert problem.value == raw(setting.name, features[setting.name])
    assert problem.message.startswith(f"cannot be used with {other.key} = ")
    ours, _, theirs = problem.cure.partition(f", or {other.key} to ")
    assert ours.startswith(f"set {setting.key} to ") and theirs
    assert f" where {other.key} is " in problem.allowed
    for mended, words in ((setting, ours), (other, theirs)):  # what the cure names cures, and nothing else would
        for value in mended.values:
            word = CLASSES[value][1] if value in CLASSES else value
            named = re.search(rf"\b{word}\b", words.removeprefix(f"set {setting.key}")) is not None
            assert named != is_refused(setting, other, features | {mended.name: value}), f"{mended.name} = {value}"


def is_refused(setting: Setting, other: Setting, features: dict[str, str]) -> bool:
    found = problems_of(*features.items())
    return any(p.key == setting.key and p.message.startswith(f"cannot be used with {other.key} = ") for p in found)


def test_a_refusal_reads_only_its_two_fields() -> None:
    for refusal, rule in zip(REFUSALS, REFUSED_PAIRS, strict=True):
        seen: set[str] = set()
        watched: Any = Watched(RunConfig(), "", seen)
        list(rule.function(watched, None))
        assert set(rule.reads) == set(keys_of(refusal))
        assert seen <= {"deepspeed" if key.startswith("deepspeed.") else key for key in rule.reads}  # one field


@pytest.mark.parametrize("pair", REFUSED_BY_OTHERS, ids=lambda pair: "-".join(map("=".join, pair)))
def test_a_pair_that_leaves_nothing_to_another_axis_says_to_which(pair: tuple[Feature, Feature]) -> None:
    (text,) = refusals_of(dict(pair))
    setting = SETTINGS[values_left(dict(pair)).lacking or ""]
    assert f"leave no value to {setting.name}:" in text
    assert all(
        f"{setting.name} {value if value[0] == '>' else f'= {value}'}".replace(">", "> ") in text
        for value in setting.values
    )
    for value in setting.values:
        assert problems_of(*pair, (setting.name, value)), "the config is refused, whatever the setting is set to"


def test_an_allowed_pair_is_not_refused() -> None:
    assert len(allowed_pairs()) > 3500 and len(REFUSED) > 40 and len(REFUSED_BY_OTHERS) > 20
    assert len(allowed_pairs()) + len(REFUSED) + len(REFUSED_BY_OTHERS) == len(list(pairs()))
    for pair in allowed_pairs():
        assert refusals_of(dict(pair)) == []


def test_every_value_of_a_config_is_a_feature() -> None:
    assert SETTINGS["pp"].value_of(1) == "1" and SETTINGS["pp"].value_of(4) == ">1"
    assert SETTINGS["dropout"].value_of(0.0) == "0" and SETTINGS["dropout"].value_of(0.25) == ">0"
    assert SETTINGS["num_experts"].value_of(0) == "0" and SETTINGS["num_experts"].value_of(64) == ">0"
    assert SETTINGS["compile"].value_of(True) == "true" and SETTINGS["zero_stage"].value_of(3) == "3"
    assert {setting.key for setting in SETTINGS.values()} <= {*all_fields(), *(f"deepspeed.{key}" for key in ALLOWED)}


def test_a_key_below_deepspeed_is_a_feature_set_or_not() -> None:
    for zero, overlap, size in (({}, "false", "null"), ({"overlap_comm": True, "sub_group_size": 0}, "true", "number")):
        config = RunConfig(deepspeed={"zero_optimization": zero})
        for name, value in (("overlap_comm", overlap), ("sub_group_size", size)):
            assert SETTINGS[name].value_of(value_at(config, SETTINGS[name].key)) == value
    for not_a_section in ({}, {"zero_optimization": 3}):
        assert value_at(RunConfig(deepspeed=not_a_section), SETTINGS["overlap_comm"].key) is None


def test_a_question_names_features_by_name_or_key() -> None:
    assert read_features("zero_stage=2,pp=4") == {"zero_stage": "2", "pp": ">1"}
    assert read_features(" parallel.zero_stage = 2 , expert_capacity=1.25") == {
        "zero_stage": "2",
        "expert_capacity": "number",
    }
    assert read_features("pp=1,num_experts=0") == {"pp": "1", "num_experts": "0"}


@pytest.mark.parametrize(
    ("text", "key", "cure"),
    [
        ("zero=2", "zero", "did you mean zero_stage?"),
        ("pp_schedule=zvb", "pp_schedule", "did you mean zbv?"),
        ("pp=zero", "pp", "write pp=1 or pp=4"),
        ("tp=0", "tp", "write tp=1 or tp=4"),
        ("", "", "did you mean"),
        ("dtype=fp32,dtype=bf16", "dtype", "leave one out"),
    ],
)
def test_a_question_that_is_not_understood(text: str, key: str, cure: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_features(text)
    (problem,) = error.value.problems
    assert problem.key == key and cure in problem.cure and problem.allowed


def test_all_refusals_of_a_question_are_told() -> None:
    texts = refusals_of(read_features("zero_stage=3,pp=2,optimizer=muon,tp=2"))
    assert len(texts) == 2 and "ZeRO-2 and ZeRO-3" in texts[0] and "muon" in texts[1]
    assert all("cure: set " in text for text in texts)


def test_the_page_is_up_to_date() -> None:
    page = (ROOT / compatibility_page.PAGE).read_text(encoding="utf-8")
    assert page == compatibility_page.with_tables(page), "renew it: python -m megatrain.config.pages.reference"
    for refusal in REFUSALS:
        assert refusal.reason in page


def test_no_two_refusals_name_the_same_pair() -> None:
    for one, two in combinations(REFUSALS, 2):
        assert not one.pairs & two.pairs
