"""BERT as a function of its weights, sentence by sentence, in FP64 (Devlin et al. 2019; Vaswani et al. 2017).

Shapes: n tokens of a sentence, D width, K head width, V tokens.
"""

import math

import torch
from torch import Tensor


def masked_language_model(
    weights: dict[str, Tensor],
    tokens_BS: Tensor,
    labels_BS: Tensor,
    lengths_B: Tensor,
    layers: int,
    heads: int,
    padding: int,
) -> Tensor:
    """Sums [B] of the losses of the labelled tokens; what stands behind a sentence's end is not looked at."""
    losses = []
    for tokens, labels, length in zip(tokens_BS, labels_BS, lengths_B.tolist(), strict=True):
        x = _encoded(weights, tokens[:length], layers, heads)
        x = _gelu(_linear(weights, "head.transform.dense", x))
        x = _norm(weights, "head.transform.norm", x)
        scores = x @ weights["embedding.word.weight"].T + weights["head.bias"]
        chances = scores[:, : scores.shape[1] - padding].exp()
        chances = chances / chances.sum(1, keepdim=True)
        terms = [-chances[place, label].log() for place, label in enumerate(labels[:length].tolist()) if label >= 0]
        losses.append(torch.stack(terms).sum() if terms else torch.zeros((), dtype=torch.float64))
    return torch.stack(losses)


def _encoded(weights: dict[str, Tensor], tokens: Tensor, layers: int, heads: int) -> Tensor:
    x = weights["embedding.word.weight"][tokens] + weights["embedding.position.weight"][: len(tokens)]
    x = _norm(weights, "embedding.norm", x + weights["embedding.token_type.weight"][0])
    for number in range(layers):
        name = f"layers.{number}"
        x = _norm(weights, f"{name}.attention_norm", x + _attention(weights, f"{name}.attention", x, heads))
        inner = _gelu(_linear(weights, f"{name}.feed_forward.up", x))
        x = _norm(weights, f"{name}.feed_forward_norm", x + _linear(weights, f"{name}.feed_forward.down", inner))
    return x


def _attention(weights: dict[str, Tensor], name: str, x: Tensor, heads: int) -> Tensor:
    """Head by head; the rows of a head's query, key and value stand together."""
    rows = _linear(weights, f"{name}.query_key_value", x).chunk(heads, dim=1)
    mixed = []
    for query, key, value in (part.chunk(3, dim=1) for part in rows):
        scores = (query @ key.T / math.sqrt(query.shape[1])).exp()
        mixed.append(scores / scores.sum(1, keepdim=True) @ value)
    return _linear(weights, f"{name}.output", torch.cat(mixed, dim=1))


def _linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _gelu(x: Tensor) -> Tensor:
    """Hendrycks & Gimpel 2016: x times the normal distribution's function."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def _norm(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Ba et al. 2016."""
    centred = x - x.mean(1, keepdim=True)
    return (
        centred / (centred.square().mean(1, keepdim=True) + 1e-12).sqrt() * weights[f"{name}.weight"]
        + weights[f"{name}.bias"]
    )
