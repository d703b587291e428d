"""What differs between the config of a checkpoint and that of the run which goes on from it."""

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatrain.config.reading.yaml_text import one_line
from megatrain.config.schema import RunConfig
from megatrain.spec.derive import resolve_model
from megatrain.spec.keys import flat
from megatrain.spec.older import of_this_version
from megatrain.spec.schema import ModelConfig

_NO_NUMBERS = (
    *("name", "folder", "parallel.", "offload.", "checkpoint.", "deepspeed.", "data.validation", "data.tokenizer"),
    *("train.micro_batch_size", "train.activation_checkpointing", "train.checkpoint_every_nth", "train.compile"),
    *("train.activation_budget", "train.offload_activations", "train.log_every", "train.eval_every"),
    *("train.eval_batches", "train.peak_tflops", "train.max_skipped_steps", "model.attention.documents"),
    *("model.init_std", "precision.initial_loss_scale", "precision.loss_scale_window"),
    *("precision.loss_scale_hysteresis", "precision.min_loss_scale"),
)
"""Beginnings of the keys that change where and how fast a run computes, what it keeps and what it reports."""
_WIDEST_VALUE = 40


@dataclass(frozen=True)
class Change:
    """A key and its two values; ``numbers``: whether losses to come depend on it."""

    key: str
    before: Any
    now: Any
    numbers: bool


def changes(saved: Mapping[str, Any], config: RunConfig) -> list[Change]:
    """All keys that differ, those that change the losses first.

    Args:
        saved: the resolved config that a checkpoint keeps, or some of its sections. A key that it lacks in a section
            that it has stood at its default: an older version knew no other value.
        config: the resolved one of now.
    """
    defaults = RunConfig()
    of_before = dict(saved)
    if "model" in saved:
        model = resolve_model(ModelConfig.model_validate(of_this_version(saved["model"])))
        of_before["model"] = model.model_dump(mode="json")
    now = _leaves(config, of_before)
    before = {**_leaves(defaults, of_before), **flat(of_before)}
    found = [
        Change(key, before.get(key), now.get(key), _changes_numbers(key, config))
        for key in dict.fromkeys([*now, *before])
        if before.get(key) != now.get(key)
    ]
    return sorted(found, key=lambda change: not change.numbers)


def table(found: Sequence[Change]) -> list[str]:
    """``found`` as lines: key, value of the checkpoint, value of now, and which of them change the losses."""
    rows = [("differs from the checkpoint", "then", "now", "changes the losses")]
    rows += [(c.key, _short(c.before), _short(c.now), "yes" if c.numbers else "no") for c in found]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        "    " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _changes_numbers(key: str, config: RunConfig) -> bool:
    if key == "train.steps":  # cosine and linear have their own last step
        return config.schedule.name == "wsd"
    if key.startswith("data.train.") and key.endswith(".path"):  # where it lies; what it holds is checked by digest
        return False
    return not key.startswith(_NO_NUMBERS)


def _leaves(config: RunConfig, sections: Container[str]) -> dict[str, Any]:
    """The values of some of the sections by dotted key."""
    return flat({name: value for name, value in config.model_dump(mode="json").items() if name in sections})


def _short(value: Any) -> str:
    text = one_line(value)
    return text if len(text) <= _WIDEST_VALUE else text[: _WIDEST_VALUE - 1] + "…"
