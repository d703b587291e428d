"""Cases made of the table of compatibility: few, and together they hold every pair of features that go together.

A greedy covering array (Cohen et al. 1997): each case begins with a pair that no case has yet, and then takes setting
by setting the value that brings the most new pairs. Nothing is random. A case holds a pair only where both fields do
something: a way of scoring experts is not tried by a dense model.
"""

import functools
import math
from collections.abc import Iterator
from itertools import combinations, product
from typing import Any

from megatrain.config.rules.combine import values_left
from megatrain.config.rules.compatibility import SETTINGS

Feature = tuple[str, str]
Case = dict[str, str]

FEATURES: list[Feature] = [(setting.name, value) for setting in SETTINGS.values() for value in setting.values]
# what stands for a class of values in a config
SAMPLES: dict[str, Any] = {
    "dropout": 0.1, "attention_dropout": 0.1, "num_experts": 8, "expert_capacity": 1.0, "num_shared_experts": 1,
    "num_dense_layers": 1, "expert_interval": 2, "router_groups": 2, "router_balance_rate": 0.01,
    "tp": 2, "cp": 2, "pp": 2, "dp": 2, "ep": 2,
    "reduce_bucket_size": 1000, "sub_group_size": 1000, "stage3_prefetch_bucket_size": 1000,
    "stage3_param_persistence_threshold": 100, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
}  # fmt: skip
MOST_RANKS = 8
BLOCKS = {"full": ["full"], "window": ["window", "full"], "bidirectional": ["bidirectional"]}
RAMPS: dict[str, list[dict[str, int]]] = {"one_length": [], "shorter_first": [{"until_step": 1, "seq_len": 8}]}
GPU_ONLY = {
    ("document_attention", "flex"): "FlexAttention gives no gradients on CPUs",
    ("document_attention", "varlen"): "FlashAttention runs on GPUs only",
}
"""Features that are left out of the cases, and why: tests/models/test_document_attention.py has what can be had."""
_SIZES = ("tp", "cp", "pp", "dp")


def raw(setting: str, value: str) -> Any:
    """A config's value for a feature."""
    if value == SETTINGS[setting].values[-1] and SETTINGS[setting].is_open:
        return SAMPLES[setting]
    if setting == "blocks":
        return BLOCKS[value]
    if setting == "ramp":
        return RAMPS[value]
    return {"null": None, "true": True, "false": False}.get(value, int(value) if value.isdigit() else value)


def sections(features: Case) -> dict[str, dict[str, Any]]:
    """Features as sections of a config file."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in features.items():
        *outer, field = SETTINGS[name].key.split(".")
        if outer[0] == "deepspeed" and raw(name, value) is None:
            continue  # is left out where it is not set
        section: dict[str, Any] = found
        for part in outer:
            section = section.setdefault(part, {})
        section[field] = raw(name, value)
    return found


def num_ranks(case: Case) -> int:
    return math.prod(raw(name, case[name]) for name in _SIZES)


def pairs() -> Iterator[tuple[Feature, Feature]]:
    """Every two values of different settings."""
    yield from ((one, two) for one, two in combinations(FEATURES, 2) if one[0] != two[0])


def is_allowed(one: Feature, two: Feature) -> bool:
    return values_left(dict((one, two))).lacking is None


@functools.cache
def allowed_pairs() -> tuple[tuple[Feature, Feature], ...]:
    return tuple(pair for pair in pairs() if is_allowed(*pair))


def is_used(feature: Feature, case: Case) -> bool:
    """Whether a feature of a case does anything there."""
    needs = SETTINGS[feature[0]].used_with
    return needs is None or case[needs[0]] in needs[1]


def used(case: Case) -> set[Feature]:
    return {feature for feature in case.items() if is_used(feature, case)}


def in_use(features: Case) -> Iterator[Case]:
    """``features`` with every choice of others that they need to do anything."""
    needs = [needs for name in features if (needs := SETTINGS[name].used_with)]
    own = [(name, [features[name]] if name in features else values) for name, values in needs]
    for choice in product(*(values for _, values in own)):
        yield features | dict(zip((name for name, _ in own), choice, strict=True))


@functools.cache
def pairs_in_use() -> dict[tuple[Feature, Feature], list[Case]]:
    """The allowed pairs that a CPU can try, and the features that a case needs for each."""
    found = {}
    for one, two in allowed_pairs():
        whole = [case for case in in_use(dict((one, two))) if left_to(case) is not None and {one, two} <= used(case)]
        if whole and not GPU_ONLY.keys() & {one, two}:
            found[one, two] = whole
    return found


def left_to(chosen: Case) -> dict[str, tuple[str, ...]] | None:
    """The values that a case still may have on its other settings; None where it can't be completed."""
    left = values_left(chosen)
    values = {
        setting: tuple(value for value in own if (setting, value) not in GPU_ONLY)
        for setting, own in left.values.items()
        if setting not in chosen
    }
    full = [name for name in _SIZES if chosen.get(name) == ">1"]
    if len(full) == 3:  # two ranks each: all that there are
        values = {setting: ("1",) if setting in _SIZES else own for setting, own in values.items()}
    if chosen.get("ep") == ">1":  # the expert ranks are taken from those of dp and cp
        for one, two in (("dp", "cp"), ("cp", "dp")):
            if chosen.get(one) == "1":
                values = {setting: (">1",) if setting == two else own for setting, own in values.items()}
    too_many = len(full) > 3 or all(chosen.get(name) == want for name, want in (("ep", ">1"), ("dp", "1"), ("cp", "1")))
    return None if left.lacking or too_many else values


@functools.cache
def covering() -> tuple[Case, ...]:
    """Complete cases that together hold every pair in use."""
    missing = {frozenset(pair): starts for pair, starts in pairs_in_use().items()}
    cases: list[Case] = []
    while missing:
        starts = next(iter(missing.values()))
        case = _completed(starts[len(cases) % len(starts)], missing, len(cases))
        for pair in held(case):
            missing.pop(pair, None)
        cases.append(case)
    return tuple(cases)


def held(case: Case) -> Iterator[frozenset[Feature]]:
    """The pairs of features that a case tries."""
    yield from map(frozenset, combinations(sorted(used(case)), 2))


def _completed(start: Case, missing: dict, turn: int) -> Case:
    """A case with these features and as many missing pairs as a greedy search finds; ties go to each value in turn."""
    chosen = dict(start)
    while left := left_to(chosen):
        # the setting with the fewest values left first: others must not take its last one
        setting = min(left, key=lambda name: (len(left[name]), -len(SETTINGS[name].values)))
        values = left[setting]
        found = []
        shift = 0 if setting in _SIZES else turn  # few ranks are cheap
        for number in range(len(values)):
            feature = (setting, values[(number + shift) % len(values)])
            if left_to({**chosen, setting: feature[1]}) is not None:
                news = sum(frozenset({feature, other}) in missing for other in chosen.items())
                found.append((news, -number, feature))
        assert found, f"{chosen} leaves no value to {setting}"
        chosen |= [max(found)[2]]
    assert left is not None, f"{start} is said to go together"
    return {name: chosen[name] for name in SETTINGS}


COMPILED = {("optimizer", "cpu_adamw"), ("offload_optimizer", "nvme"), ("offload_parameters", "nvme")}
"""Features for which DeepSpeed first compiles C++, which takes minutes."""


IN_SAMPLE = set(FEATURES) - COMPILED - GPU_ONLY.keys()


@functools.cache
def sample() -> tuple[Case, ...]:
    """Some of ``covering``, cheap ones first, that together use every feature of ``IN_SAMPLE``."""
    missing, chosen = set(IN_SAMPLE), []
    cases = [case for case in covering() if not COMPILED & set(case.items())]
    while missing:
        best = max(cases, key=lambda case: len(missing & used(case)) / _cost(case))
        missing -= used(best)
        chosen.append(best)
    return tuple(chosen)


def _cost(case: Case) -> float:
    """Of a run, about: its ranks, each of which traces blocks that are compiled; and one process before it."""
    return num_ranks(case) * (4 if case["compile"] == "true" else 1) + 5
