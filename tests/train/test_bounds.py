"""Every number at the least and the most that the schema allows: a run trains, or says what is wrong."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatrain.config.reading.fields import _entries
from megatrain.config.rules.check import check
from megatrain.config.rules.numbers import LEAST
from megatrain.config.schema import RunConfig
from megatrain.spec.keys import nested
from tests.data.factory import make_dataset
from tests.pool import Pool

Sections = dict[str, dict[str, Any]]

BASE: Sections = {
    "model": {"num_layers": 1, "hidden_size": 16, "attention.num_heads": 2, "vocab_size": 300, "max_seq_len": 32},
    "precision": {"dtype": "fp32"},
    "data": {"seq_len": 16, "train": "DATA", "validation": "DATA"},
    "train": {"steps": 2, "global_batch_size": 2, "log_every": 1, "eval_batches": 1},
    "checkpoint": {"background": False},
}
MIXTURE = {
    "experts.num_experts": 4,
    "experts.hidden_size": 16,
    "router.balance_rate": 1e-3,
    "router.score": "sigmoid",
}
STRETCHED = {"rope.factor": 2.0, "rope.original_max_seq_len": 16}
LONGROPE = {"rope.scaling": "longrope", "rope.short_factors": [1.0] * 4, "rope.long_factors": [2.0] * 4}
# what makes a number count, or leaves room for the least of it
CONTEXTS: list[Sections] = [
    {},
    {"precision": {"dtype": "fp16", "initial_loss_scale": 1024.0}},
    {"model": {**MIXTURE, "router.groups": 2}},
    {
        "model": {
            "experts.num_experts": 1,
            "experts.per_token": 1,
            "router.normalize": False,
            "router.balance_loss": 0.0,
        }
    },
    *({"model": {"rope.scaling": kind, **STRETCHED}} for kind in ("llama3", "yarn", "dynamic")),
    {"model": {"rope.scaling": "yarn", **STRETCHED, "rope.beta_slow": LEAST}},
    {"model": {"rope.scaling": "llama3", **STRETCHED, "rope.low_freq_factor": LEAST / 2}},
    {"model": {**LONGROPE, **STRETCHED}},
    {"model": {"rope.scaling": "linear"}},
    {"model": {"family": "gpt"}},
    {"model": {"family": "gpt", "attention.num_heads": 1}},
    {"model": {"family": "gpt"}, "data": {"seq_len": 1}},
    *({"optimizer": {"name": name}} for name in ("lion", "muon", "adafactor")),
    *({"train": {"activation_checkpointing": mode}} for mode in ("every_nth", "budget")),
    *({"schedule": {"name": name}} for name in ("linear", "inverse_sqrt", "wsd")),
    {"data": {"train": {"a": {"path": "DATA"}, "b": {"path": "DATA"}}, "weigh_by": "tokens"}},
    {"checkpoint": {"keep_last": 1}},
]
ALWAYS_REFUSED = {
    "model.experts.capacity",
    "model.rope.high_freq_factor",
    "model.rope.beta_fast",
    "data.temperature",
    "precision.initial_loss_scale",
    "precision.min_loss_scale",
}
"""Whose least value a rule refuses wherever it counts."""
BY_DEFAULT = {"precision.min_loss_scale", "precision.initial_loss_scale", "data.temperature", "optimizer.eps"}


def ends() -> Iterator[tuple[str, float]]:
    """(dotted key, its least value) and (…, its most), of each number that has such a bound."""
    for key, own in _entries():
        for kind in own.get("anyOf", [own]):
            whole = kind.get("type") == "integer"
            if "minimum" in kind:
                yield key, kind["minimum"] if whole else float(kind["minimum"])
            if "exclusiveMinimum" in kind:
                yield key, LEAST
            if "maximum" in kind and not whole:
                yield key, float(kind["maximum"])
            if "exclusiveMaximum" in kind:
                yield key, math.nextafter(kind["exclusiveMaximum"], 0.0)


def start_each(runs: list[Sections]) -> list[str]:
    """Trains them one after the other; how each ended: with its last step, or with what it said to its user."""
    from megatrain.errors import ExpectedError
    from tests.reference.conftest import _start

    ends = []
    for sections in runs:
        try:
            ends.append(str(_start(sections)))
        except ExpectedError as error:
            ends.append(str(error))
    return ends


@pytest.mark.parametrize(
    ("key", "value"),
    [pytest.param(*end, marks=() if end[0] in BY_DEFAULT else pytest.mark.slow) for end in ends()],
)
def test_a_run_at_a_bound_trains_or_says_why_not(pool: Pool, memory_path: Path, key: str, value: float) -> None:
    data, runs = json.dumps(str(make_dataset(memory_path / "data", 3000))), []
    section, _, field = key.partition(".")
    for number, context in enumerate(CONTEXTS):
        sections = {name: {**BASE.get(name, {}), **context.get(name, {})} for name in {*BASE, *context, section}}
        sections[section] = {**sections[section], field: value}
        sections = json.loads(json.dumps(sections | {"model": nested(sections["model"])}).replace('"DATA"', data))
        if not check(RunConfig.model_validate(sections), 1):
            runs.append({"folder": str(memory_path), "name": f"run-{number}", **sections})
    assert runs or key in ALWAYS_REFUSED
    (ended,) = pool.run(start_each, 1, runs)  # which raises what is no message for users
    assert len(ended) == len(runs)
