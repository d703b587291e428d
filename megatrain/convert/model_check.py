"""Whether what a file says of a model describes one, asked before anything is built from it."""

from collections.abc import Collection, Mapping

import torch
from pydantic import ValidationError
from torch import Tensor

from megatrain.config.rules import experts as rules_experts
from megatrain.config.rules import model as rules_model
from megatrain.config.schema import RunConfig
from megatrain.convert.errors import ConversionError
from megatrain.spec.derive import resolve_model
from megatrain.spec.keys import flat
from megatrain.spec.schema import ModelConfig, ModelSpec

_RULES = (
    rules_model.heads_divide_width,
    rules_model.rotary_needs_even_heads,
    rules_model.groups_divide_heads,
    rules_model.padding_leaves_tokens,
    rules_model.scaled_frequencies_differ,
    rules_model.longrope_has_factors,
    rules_experts.tokens_find_experts,
    rules_experts.groups_share_experts,
    rules_experts.dense_blocks_leave_room,
)
"""Those that ask for nothing but the model."""

_LARGEST, _MOST_EXPERTS = 2**40, 2**16


def resolved(model: ModelConfig, where: str) -> ModelSpec:
    """``model`` with nothing left open, if its sizes fit each other.

    Raises:
        ConversionError: they don't; all that is wrong is named. ``where``: the file that says so.
    """
    sizes = {name: value for name, value in flat(model.model_dump()).items() if type(value) is int}
    limits = dict.fromkeys(sizes, _LARGEST) | {"experts.num_experts": _MOST_EXPERTS}
    if large := [f"{name} = {value}" for name, value in sizes.items() if value >= limits[name]]:
        raise ConversionError(f"{where}: {', '.join(large)}: no model is so large")
    config = RunConfig(model=model)
    for rule in _RULES:  # what one finds would make the next ones stumble
        if problems := list(rule(config, None)):
            raise ConversionError("; ".join(f"{where}: {problem.key} {problem.message}" for problem in problems))
    return resolve_model(model)


def require_plausible(model: ModelSpec, names: Collection[object], where: object) -> None:
    """Checks that there are tensors enough for a model, before one of this size is built to compare names.

    Raises:
        ConversionError: there are fewer tensors than blocks.
    """
    if model.num_layers > len(names):
        raise ConversionError(f"{where}: {len(names)} tensors are not those of a model of {model.num_layers} blocks")


def require_tied(head: Tensor, word: Tensor, where: str) -> None:
    """Checks that the copy of a tied head is the word embedding.

    Raises:
        ConversionError: it is a head of its own.
    """
    if head.shape != word.shape or not torch.equal(head, word):
        raise ConversionError(
            f"{where} is not the word embedding, which tie_word_embeddings says it is: transformers 5 keeps it and "
            "transformers 4 does not. Set tie_word_embeddings to false, or take the tensor out"
        )


def said(error: ValidationError, names: Mapping[str, str] | None = None) -> str:
    """What is wrong, in one line: each field, by its name in ``names`` where it has one, its value and the reason."""
    found = []
    for detail in error.errors(include_url=False)[:5]:
        field = ".".join(map(str, detail["loc"]))
        found.append(f"{(names or {}).get(field, field)} = {detail['input']!r:.100}: {detail['msg']}")
    return "; ".join(found)
