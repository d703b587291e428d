"""The proof that a conversion changed nothing: every weight bit for bit, and the logits of both models.

Shapes: B sequences, S tokens, R rows (tokens of any sequence), V vocabulary.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatrain.convert.errors import ProofFailed
from megatrain.convert.huggingface.config import differences
from megatrain.convert.huggingface.tokenizer import load
from megatrain.convert.runners import Runner
from megatrain.convert.table import VOCABULARY_NAMES, Weights, canonical_shapes, kinds_of
from megatrain.models.parts.rotary import LENGTH_DEPENDENT
from megatrain.spec.derive import num_tokens
from megatrain.spec.schema import ModelSpec

LOGITS = 1e-4  # largest difference: FP32 sums in another order stay below it, every known conversion bug above
_TIE = 1e-5  # the two likeliest tokens are so near that rounding alone may swap them
_ACTIVATIONS = 1e-5  # relative to the largest: a block's own rounding stays below
_SHORT = 64  # tokens that every proof runs, whatever is asked for
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Proof:
    """What was compared. ``num_rounded``: tensors that lost bits to the type of the target, and are equal since;
    ``max_difference``: of the logits."""

    num_tensors: int
    num_rounded: int
    num_tokens: int
    max_difference: float


def require_equal_configs(source: ModelSpec, target: ModelSpec) -> None:
    """Compares what both sides say the model is.

    Raises:
        ProofFailed: names every field that differs.
    """
    if found := list(differences(source, target)):
        raise ProofFailed("the config that was written is of another model: " + "; ".join(found))


def require_equal_weights(source: Weights, target: Weights, progress: Callable[[], None]) -> tuple[int, int]:
    """Compares every tensor bit for bit, the source's in the type that the target has; returns how many there are, and
    how many of these the type rounded.

    Raises:
        ProofFailed: names the first tensor that differs and how many do.
    """
    different, count, rounded = [], 0, 0
    kinds = [kind for kind in source.reader.kinds if kind in target.reader.kinds]
    for name in canonical_shapes(source.model):
        for kind in kinds_of(name, kinds):
            one, other = source.read(kind, name), target.read(kind, name)
            if name in VOCABULARY_NAMES:
                one, other = (
                    tensor[: num_tokens(weights.model)] for tensor, weights in ((one, source), (other, target))
                )
            converted = one.to(other.dtype)
            if not _same_bits(converted, other):
                different.append(f"{kind} of {name}")
            rounded += not _same_bits(converted.to(one.dtype), one)
            count += 1
        progress()
    if different:
        raise ProofFailed(f"{len(different)} of {count} tensors are not bit-equal, the first: {different[0]}")
    return count, rounded


def require_equal_logits(one: Runner, other: Runner, batches: list[Tensor], progress: Callable[[], None]) -> float:
    """Runs both models on the same tokens, block by block; returns the largest difference of a logit.

    Raises:
        ProofFailed: names the first layer whose activations differ.
    """
    first = None
    pairs = zip(one.activations(batches), other.activations(batches), strict=True)
    for number, (ours, theirs) in enumerate(pairs):
        error = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(ours, theirs, strict=True))
        if first is None and not error <= _ACTIVATIONS:  # not: NaN compares with nothing
            first = f"{'the embedding' if number == 0 else f'layers.{number - 1}'} (relative {error:.1e})"
        progress()
    found, swapped = [], 0
    for a_RV, b_RV in zip(one.logits(), other.logits(), strict=True):
        if a_RV.shape != b_RV.shape:
            raise ProofFailed(f"logits of {a_RV.shape[1]} and {b_RV.shape[1]} tokens: vocabulary padding left in?")
        found.append((a_RV - b_RV).abs().max())
        swapped += _different_choices(a_RV, b_RV)
    progress()
    worst = float(torch.stack(found).max())  # NaN where one is
    if not worst <= LOGITS or swapped:
        raise ProofFailed(
            f"logits differ by {worst:.1e} (allowed: {LOGITS:.0e}) and the likeliest token at {swapped} of "
            f"{sum(batch.numel() for batch in batches)} positions; the first that differs: "
            f"{first or 'the final norm or the head'}"
        )
    return worst


def proof_batches(model: ModelSpec, longest: int, tokenizer: Path | None) -> list[Tensor]:
    """[B, S] tokens: short random ones, random ones up to position ``longest``, and real text where there is a
    tokenizer (the source of a module of Python's library).

    However small ``longest`` is, one sequence is longer than the length from which on rotary positions change or the
    first tokens lie outside a window.
    """
    generator = torch.Generator().manual_seed(0)
    length = min(model.max_seq_len, longest)

    def random(*shape: int) -> Tensor:
        return torch.randint(0, num_tokens(model), shape, generator=generator)

    batches = [random(4, min(model.max_seq_len, _SHORT)), random(1, length)]
    change = model.rope.original_max_seq_len if model.rope.scaling in LENGTH_DEPENDENT else 0
    if "window" in model.blocks:
        change = max(change, model.attention.window)
    if max(length, _SHORT) <= change < model.max_seq_len:
        batches.append(random(1, min(model.max_seq_len, change + change // 4 + 1)))
    if tokenizer is not None:
        text = Path(os.__file__).read_text(encoding="utf-8")
        ids = load(tokenizer.read_bytes(), tokenizer).encode(text[: 8 * length]).ids
        known = [token for token in ids if token < num_tokens(model)][:length]
        if known:
            batches.append(torch.tensor([known]))
    return batches


def _different_choices(a_RV: Tensor, b_RV: Tensor) -> int:
    best = a_RV.topk(min(2, a_RV.shape[-1])).values
    clear = best[..., 0] - best[..., -1] > _TIE
    return int(((a_RV.argmax(-1) != b_RV.argmax(-1)) & clear).sum())


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    integer = _INTEGERS[one.element_size()]
    return torch.equal(one.contiguous().view(integer), other.contiguous().view(integer))
