"""Rules between fields. Each is a small function that yields a problem for what it forbids.

A rule names the fields that it reads, so that rules whose inputs are sound still run when others are not,
and all problems are shown at once.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from megatrain.config.reading.problems import Problem
from megatrain.config.rules import batch as rules_batch
from megatrain.config.rules import data as rules_data
from megatrain.config.rules import experts as rules_experts
from megatrain.config.rules import layout as rules_layout
from megatrain.config.rules import model as rules_model
from megatrain.config.rules.combine import keys_of, problem_of
from megatrain.config.rules.compatibility import REFUSALS
from megatrain.config.rules.deepspeed_keys import forbidden_keys
from megatrain.config.rules.effect import COUNTS_WITH, has_effect
from megatrain.config.rules.numbers import NUMBER_FIELDS, fits_fp32
from megatrain.config.schema import RunConfig
from megatrain.spec.derive import resolve_model


@dataclass(frozen=True)
class Rule:
    """A rule and the dotted keys that it reads."""

    function: Callable[[RunConfig, int | None], Iterable[Problem]]
    reads: tuple[str, ...]


_LAYOUT = ("parallel.tp", "parallel.cp", "parallel.pp", "parallel.dp")
_HEADS = ("model.hidden_size", "model.attention.num_heads", "model.attention.head_width")
_EXPERTS = ("model.experts.num_experts", "model.experts.per_token")
_BATCH = ("train.global_batch_size", "train.micro_batch_size")

RULES = (
    Rule(rules_model.heads_divide_width, _HEADS),
    Rule(rules_model.rotary_needs_even_heads, ("model.family", "model.positions.kind", *_HEADS)),
    Rule(rules_model.groups_divide_heads, ("model.attention.num_heads", "model.attention.num_kv_heads")),
    Rule(rules_model.padding_leaves_tokens, ("model.vocab_size", "model.vocab_padding")),
    Rule(
        rules_model.longrope_has_factors,
        ("model.rope.scaling", "model.rope.short_factors", "model.rope.long_factors", *_HEADS),
    ),
    Rule(
        rules_model.scaled_frequencies_differ,
        (
            "model.rope.scaling",
            "model.rope.low_freq_factor",
            "model.rope.high_freq_factor",
            "model.rope.beta_fast",
            "model.rope.beta_slow",
        ),
    ),
    Rule(
        rules_model.stretch_is_defined,
        (
            "model.rope.scaling",
            "model.rope.theta",
            "model.rope.attention_factor",
            "model.rope.original_max_seq_len",
            "model.max_seq_len",
        ),
    ),
    Rule(rules_model.sequence_fits_positions, ("data.seq_len", "model.max_seq_len")),
    Rule(rules_layout.ranks_fit_world, _LAYOUT),
    Rule(
        rules_layout.tensor_ranks_divide_model,
        (
            "parallel.tp",
            "model.family",
            "model.hidden_size",
            "model.attention.num_heads",
            "model.attention.num_kv_heads",
            "model.feed_forward.hidden_size",
            "model.feed_forward.activation",
            "model.vocab_size",
        ),
    ),
    Rule(
        rules_layout.sequence_parallel_fits,
        ("parallel.sequence_parallel", "parallel.tp", "parallel.cp", "data.seq_len"),
    ),
    Rule(rules_layout.context_fits_sequence, ("parallel.cp", "parallel.cp_method", "data.seq_len")),
    Rule(
        rules_layout.ulysses_divides_heads,
        ("parallel.cp", "parallel.cp_method", "parallel.tp", "model.attention.num_heads"),
    ),
    Rule(rules_layout.expert_ranks_share_data_ranks, (*_LAYOUT, "parallel.ep")),
    Rule(rules_experts.tokens_find_experts, _EXPERTS),
    Rule(rules_experts.experts_take_tokens, ("model.experts.num_experts", "model.experts.capacity")),
    Rule(
        rules_experts.router_learns,
        ("model.experts.num_experts", "model.experts.per_token", "model.router.normalize", "model.router.score"),
    ),
    Rule(
        rules_experts.groups_share_experts,
        (
            "model.experts.num_experts",
            "model.experts.per_token",
            "model.router.groups",
            "model.router.groups_per_token",
        ),
    ),
    Rule(
        rules_experts.dense_blocks_leave_room,
        ("model.experts.num_experts", "model.num_layers", "model.experts.num_dense_layers", "model.experts.interval"),
    ),
    Rule(rules_experts.expert_ranks_divide_experts, ("model.experts.num_experts", "parallel.ep")),
    Rule(
        rules_experts.tensor_ranks_divide_experts,
        ("model.experts.num_experts", "model.experts.hidden_size", "parallel.tp"),
    ),
    Rule(rules_layout.layers_fill_stages, ("model.num_layers", "parallel.pp", "parallel.stages_per_rank")),
    Rule(rules_layout.schedule_fits_stages, ("parallel.pp_schedule", "parallel.stages_per_rank")),
    Rule(
        rules_layout.stage_layers_fit,
        ("parallel.stage_layers", "model.num_layers", "parallel.pp", "parallel.stages_per_rank"),
    ),
    Rule(
        rules_layout.offload_has_a_path,
        ("offload.optimizer", "offload.parameters", "offload.nvme_path"),
    ),
    Rule(rules_batch.batch_divides, (*_BATCH, *_LAYOUT)),
    Rule(rules_batch.pipeline_has_micro_batches, (*_BATCH, *_LAYOUT, "parallel.pp_schedule")),
    Rule(rules_data.sources_have_weight, ("data.train",)),
    Rule(rules_data.temperature_leaves_numbers, ("data.temperature",)),
    Rule(rules_data.schedule_names_sources, ("data.train", "data.weight_schedule")),
    Rule(
        rules_data.ramp_fits,
        ("train.ramp", "train.global_batch_size", "data.seq_len"),
    ),
    Rule(
        rules_batch.decay_follows_warmup,
        ("schedule.name", "schedule.warmup_steps", "schedule.decay_steps", "train.steps"),
    ),
    Rule(rules_batch.loss_scales_fit, ("precision.initial_loss_scale", "precision.min_loss_scale")),
    Rule(forbidden_keys, ("deepspeed",)),
)

REFUSED_PAIRS = tuple(Rule(partial(problem_of, refusal), keys_of(refusal)) for refusal in REFUSALS)
"""A rule for each refusal in the table of compatibility."""

_WITH_EFFECT = tuple(Rule(partial(has_effect, row), (row.key, row.other)) for row in COUNTS_WITH)
"""A rule for each field that counts only with another."""

_IN_FP32 = tuple(Rule(partial(fits_fp32, key), (key,)) for key in NUMBER_FIELDS)
"""A rule for each field whose value is any number."""

_FOR_EACH_STAGE = (
    rules_batch.batch_divides,
    rules_batch.pipeline_has_micro_batches,
    rules_layout.sequence_parallel_fits,
    rules_layout.context_fits_sequence,
)


def check(config: RunConfig, world_size: int | None = None, unusable: Collection[str] = ()) -> list[Problem]:
    """All problems between the fields of ``config``.

    Args:
        world_size: ranks that were started; None where nobody knows yet, which leaves out what depends on it.
        unusable: dotted keys (of fields or sections) whose values mean nothing: rules that read them are left out.
    """
    usable = [rule for rule in (*RULES, *REFUSED_PAIRS, *_WITH_EFFECT, *_IN_FP32) if not _touches(rule, unusable)]
    features = config.model_copy(update={"model": resolve_model(config.model)})  # what a family chooses counts, too
    problems = [
        problem
        for rule in usable
        for problem in rule.function(features if rule in REFUSED_PAIRS else config, world_size)
    ]
    if problems or "train.ramp" in unusable:
        return problems
    return list(_of_ramp([rule for rule in usable if rule.function in _FOR_EACH_STAGE], config, world_size))


def _of_ramp(rules: Iterable[Rule], config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """What the rules of the batch and of the sequence say to each stage of ``train.ramp``."""
    for number, stage in enumerate(config.train.ramp):
        sizes = {"global_batch_size": stage.global_batch_size or config.train.global_batch_size}
        lengths = {"seq_len": stage.seq_len or config.data.seq_len}
        of_stage = config.model_copy(
            update={"train": config.train.model_copy(update=sizes), "data": config.data.model_copy(update=lengths)}
        )
        for rule in rules:
            for problem in rule.function(of_stage, world_size):
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


def _touches(rule: Rule, unusable: Collection[str]) -> bool:
    return any(key == bad or key.startswith(f"{bad}.") for key in rule.reads for bad in unusable)
