"""The proof that a conversion changed nothing: every weight bit for bit, and the logits of both models.

Shapes: B sequences, S tokens, V vocabulary.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatrain.checkpoint.convert.errors import ProofFailed
from megatrain.checkpoint.convert.hf_config import differences
from megatrain.checkpoint.convert.runners import Runner
from megatrain.checkpoint.convert.table import VOCABULARY_NAMES, Weights, canonical_shapes
from megatrain.config.derive import num_tokens
from megatrain.config.schema import ModelConfig

LOGITS = 1e-4  # largest difference: FP32 sums in another order stay below it, every known conversion bug above
_TIE = 1e-5  # the two likeliest tokens are so near that rounding alone may swap them
_ACTIVATIONS = 1e-5  # relative to the largest: a block's own rounding stays below
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Proof:
    """What was compared. ``max_difference``: of the logits."""

    num_tensors: int
    num_tokens: int
    max_difference: float


def require_equal_configs(source: ModelConfig, target: ModelConfig) -> None:
    """Compares what both sides say the model is.

    Raises:
        ProofFailed: names every field that differs.
    """
    if found := list(differences(source, target)):
        raise ProofFailed("the config that was written is of another model: " + "; ".join(found))


def require_equal_weights(source: Weights, target: Weights, dtype: torch.dtype, progress: Callable[[], None]) -> int:
    """Compares every tensor bit for bit, the source's rounded to the type that was written; returns their number.

    Raises:
        ProofFailed: names the first tensor that differs and how many do.
    """
    different, count = [], 0
    kinds = [kind for kind in source.reader.kinds if kind in target.reader.kinds]
    for name in canonical_shapes(source.model):
        for kind in kinds:
            one, other = source.read(kind, name).to(dtype), target.read(kind, name).to(dtype)
            if name in VOCABULARY_NAMES:
                one, other = (
                    tensor[: num_tokens(weights.model)] for tensor, weights in ((one, source), (other, target))
                )
            if not _same_bits(one, other):
                different.append(f"{kind} of {name}")
            count += 1
        progress()
    if different:
        raise ProofFailed(f"{len(different)} of {count} tensors are not bit-equal, the first: {different[0]}")
    return count


def require_equal_logits(one: Runner, other: Runner, batches: list[Tensor], progress: Callable[[], None]) -> float:
    """Runs both models on the same tokens; returns the largest difference of a logit.

    Raises:
        ProofFailed: names the first layer whose activations differ.
    """
    worst = 0.0
    for tokens_BS in batches:
        a, b = one.logits(tokens_BS), other.logits(tokens_BS)
        if a.shape != b.shape:
            raise ProofFailed(f"logits of shape {tuple(a.shape)} and {tuple(b.shape)}: vocabulary padding left in?")
        difference = float((a - b).abs().max())
        swapped = _different_choices(a, b)
        if not difference <= LOGITS or swapped:  # not: NaN compares with nothing
            raise ProofFailed(
                f"logits differ by {difference:.1e} (allowed: {LOGITS:.0e}) and the likeliest token at {swapped} of "
                f"{tokens_BS.numel()} positions; the first that differs: {_first_difference(one, other, tokens_BS)}"
            )
        worst = max(worst, difference)
        progress()
    return worst


def proof_batches(model: ModelConfig, longest: int, tokenizer: Path | None) -> list[Tensor]:
    """[B, S] tokens: short random ones, random ones up to position ``longest``, and real text where there is a
    tokenizer (the source of a module of Python's library)."""
    generator = torch.Generator().manual_seed(0)
    length = min(model.max_seq_len, longest)

    def random(*shape: int) -> Tensor:
        return torch.randint(0, num_tokens(model), shape, generator=generator)

    batches = [random(4, min(length, 64)), random(1, length)]
    if tokenizer is not None:
        from tokenizers import Tokenizer

        text = Path(os.__file__).read_text(encoding="utf-8")
        ids = Tokenizer.from_file(str(tokenizer)).encode(text[: 8 * length]).ids
        batches.append(torch.tensor([[token for token in ids if token < num_tokens(model)][:length]]))
    return batches


def _different_choices(a_BSV: Tensor, b_BSV: Tensor) -> int:
    best = a_BSV.topk(min(2, a_BSV.shape[-1])).values
    clear = best[..., 0] - best[..., -1] > _TIE
    return int(((a_BSV.argmax(-1) != b_BSV.argmax(-1)) & clear).sum())


def _first_difference(one: Runner, other: Runner, tokens_BS: Tensor) -> str:
    for place, error in _activation_errors(one, other, tokens_BS):
        if not error <= _ACTIVATIONS:
            return f"{place} (relative {error:.1e})"
    return "the final norm or the head"


def _activation_errors(one: Runner, other: Runner, tokens_BS: Tensor) -> Iterator[tuple[str, float]]:
    pairs = zip(one.activations(tokens_BS), other.activations(tokens_BS), strict=True)
    for number, (a, b) in enumerate(pairs):
        yield ("the embedding" if number == 0 else f"layers.{number - 1}"), float((a - b).abs().max() / a.abs().max())


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    integer = _INTEGERS[one.element_size()]
    return torch.equal(one.contiguous().view(integer), other.contiguous().view(integer))
