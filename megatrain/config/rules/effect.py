"""Settings that count only with another one: without it they would do nothing, and whoever set them would not know.

Here stand plain fields; fields that are features have their conditions in the table of compatibility.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatrain.config.reading.fields import value_at, with_value
from megatrain.config.reading.problems import Problem
from megatrain.config.schema import RunConfig
from megatrain.spec.derive import chosen, resolve_model


@dataclass(frozen=True)
class CountsWith:
    """``key`` does something only where ``holds`` is true of the value at ``other`` (a key or a section).

    ``needed``: the same in words, as a setting.
    """

    key: str
    other: str
    holds: Callable[[Any], bool]
    needed: str


def _one_of(other: str, *values: str) -> tuple[str, Callable[[Any], bool], str]:
    return other, lambda value: value in values, f"{other} = {' or '.join(values)}"


_ROTARY = (
    "model",
    lambda model: chosen(model, "positions.kind") == "rotary",
    "model.positions.kind = rotary",
)
_WINDOWS = "model", lambda model: "window" in chosen(model, "blocks"), "a model.blocks with window"
_MIXTURE = "model.experts.num_experts", bool, "model.experts.num_experts"
_STRETCH = "model.rope.scaling", lambda value: value != "none", "another model.rope.scaling than none"
_FP16 = _one_of("precision.dtype", "fp16")
_WITH_MOMENTS = _one_of("optimizer.name", "adamw", "lion", "muon", "cpu_adamw")
_DISK = (
    "offload",
    lambda offload: "nvme" in (offload.optimizer, offload.parameters),
    "offload.optimizer = nvme or offload.parameters = nvme",
)

COUNTS_WITH = tuple(
    CountsWith(key, *condition)
    for condition, keys in (
        (_MIXTURE, ("model.experts.per_token", "model.experts.hidden_size", "model.router.normalize")),
        (_MIXTURE, ("model.router.scale", "model.router.groups_per_token", "model.router.balance_loss")),
        (_MIXTURE, ("model.router.z_loss",)),
        (_ROTARY, ("model.rope.theta", "model.rope.scaling")),
        (_WINDOWS, ("model.attention.window",)),
        (_STRETCH, ("model.rope.factor",)),
        (
            _one_of("model.rope.scaling", "dynamic", "llama3", "yarn", "longrope"),
            ("model.rope.original_max_seq_len",),
        ),
        (_one_of("model.rope.scaling", "longrope"), ("model.rope.short_factors", "model.rope.long_factors")),
        (_one_of("model.rope.scaling", "llama3"), ("model.rope.low_freq_factor", "model.rope.high_freq_factor")),
        (_one_of("model.rope.scaling", "yarn"), ("model.rope.beta_fast", "model.rope.beta_slow")),
        (_one_of("model.rope.scaling", "yarn", "longrope"), ("model.rope.attention_factor",)),
        (_FP16, ("precision.initial_loss_scale", "precision.loss_scale_window")),
        (_FP16, ("precision.loss_scale_hysteresis", "precision.min_loss_scale")),
        (_WITH_MOMENTS, ("optimizer.beta1", "optimizer.beta2")),
        (_one_of("optimizer.name", "adamw", "muon", "cpu_adamw"), ("optimizer.eps",)),
        (_one_of("optimizer.name", "muon"), ("optimizer.muon_momentum", "optimizer.muon_split_qkv")),
        (_DISK, ("offload.nvme_path",)),
        (_one_of("schedule.name", "cosine", "linear", "wsd"), ("schedule.decay_steps",)),
        (_one_of("schedule.name", "cosine", "linear", "inverse_sqrt", "wsd"), ("schedule.min_lr_ratio",)),
        (_one_of("data.objective", "masked"), ("data.mask_probability", "data.mask_token")),
        (_one_of("data.weigh_by", "tokens"), ("data.temperature",)),
        (_one_of("train.activation_checkpointing", "every_nth"), ("train.checkpoint_every_nth",)),
        (_one_of("train.activation_checkpointing", "budget"), ("train.activation_budget",)),
        (("checkpoint.keep_last", bool, "checkpoint.keep_last"), ("checkpoint.keep_every",)),
        (("checkpoint.load", lambda value: value is not None, "checkpoint.load"), ("checkpoint.load_what",)),
    )
    for key in keys
)
"""Every such field, by what it counts with."""

_DEFAULTS = RunConfig()


def _left_open(config: RunConfig, key: str) -> Any:
    """What a field of the model is where it is not set: a resolved config has that."""
    open_config = with_value(config, key, value_at(_DEFAULTS, key))
    return value_at(open_config.model_copy(update={"model": resolve_model(open_config.model)}), key)


def has_effect(condition: CountsWith, config: RunConfig, world_size: int | None = None) -> Iterator[Problem]:
    """A rule (rules.py) for each of ``COUNTS_WITH``. A field at its default is not set."""
    value, default = value_at(config, condition.key), value_at(_DEFAULTS, condition.key)
    if value in (default, _left_open(config, condition.key)) or condition.holds(value_at(config, condition.other)):
        return
    yield Problem(
        condition.key,
        value,
        f"has no effect: it counts only with {condition.needed}",
        f"its default, {'null' if default is None else default}",
        f"leave {condition.key} out, or set {condition.needed}",
    )
