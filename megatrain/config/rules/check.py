"""All rules between fields, asked at once.

A rule names the fields that it reads, so that rules whose inputs are sound still run when others are not,
and all problems are shown at once.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from functools import partial

from megatrain.config.reading.problems import Problem
from megatrain.config.rules import batch as rules_batch
from megatrain.config.rules import data as rules_data
from megatrain.config.rules import deepspeed_keys
from megatrain.config.rules import experts as rules_experts
from megatrain.config.rules import layout as rules_layout
from megatrain.config.rules import model as rules_model
from megatrain.config.rules.combine import keys_of, problem_of
from megatrain.config.rules.compatibility import REFUSALS
from megatrain.config.rules.effect import COUNTS_WITH, has_effect
from megatrain.config.rules.numbers import NUMBER_FIELDS, fits_fp32
from megatrain.config.rules.rule import Rule, rules_of
from megatrain.config.schema import RunConfig
from megatrain.spec.derive import resolve_model

RULES = tuple(
    rule
    for module in (rules_model, rules_layout, rules_experts, rules_batch, rules_data, deepspeed_keys)
    for rule in rules_of(module)
)
"""Those that count, in the order in which their problems are told."""

REFUSED_PAIRS = tuple(Rule(partial(problem_of, refusal), keys_of(refusal)) for refusal in REFUSALS)
"""A rule for each refusal in the table of compatibility."""

_WITH_EFFECT = tuple(Rule(partial(has_effect, row), (row.key, row.other)) for row in COUNTS_WITH)
"""A rule for each field that counts only with another."""

_IN_FP32 = tuple(Rule(partial(fits_fp32, key), (key,)) for key in NUMBER_FIELDS)
"""A rule for each field whose value is any number."""


def check(config: RunConfig, world_size: int | None = None, unusable: Collection[str] = ()) -> list[Problem]:
    """All problems between the fields of ``config``.

    Args:
        world_size: ranks that were started; None where nobody knows yet, which leaves out what depends on it.
        unusable: dotted keys (of fields or sections) whose values mean nothing: rules that read them are left out.
    """
    usable = [rule for rule in (*RULES, *REFUSED_PAIRS, *_WITH_EFFECT, *_IN_FP32) if rule.is_sound_without(unusable)]
    features = config.model_copy(update={"model": resolve_model(config.model)})  # what a family chooses counts, too
    problems = [
        problem for rule in usable for problem in rule(features if rule in REFUSED_PAIRS else config, world_size)
    ]
    if problems or "train.ramp" in unusable:
        return problems
    return list(_of_ramp([rule for rule in usable if rule.of_each_shape], config, world_size))


def _of_ramp(rules: Iterable[Rule], config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """What the rules of the batch and of the sequence say to each shape that ``train.ramp`` gives the steps."""
    for number, stage in enumerate(config.train.ramp):
        sizes = {"global_batch_size": stage.global_batch_size or config.train.global_batch_size}
        lengths = {"seq_len": stage.seq_len or config.data.seq_len}
        of_shape = config.model_copy(
            update={"train": config.train.model_copy(update=sizes), "data": config.data.model_copy(update=lengths)}
        )
        for rule in rules:
            for problem in rule(of_shape, world_size):
                yield replace(problem, key=f"train.ramp.{number}.{problem.key.rpartition('.')[2]}")


def check_ready_to_train(config: RunConfig, has_file: bool) -> list[Problem]:
    """What a training run needs beyond a valid config; planning and printing do without.

    Args:
        has_file: a config file was given.
    """
    return list(_has_data(config, has_file))


def _has_data(config: RunConfig, has_file: bool) -> Iterator[Problem]:
    if not config.data.train:
        cure = "make a data set with data_tools/tokenize_text.py and set data.train to its folder"
        if not has_file:
            cure = f"name the run's file by `--config FILE`: none was given; or {cure}"
        yield Problem("data.train", "", "names no data set to train on", "a folder", cure)
