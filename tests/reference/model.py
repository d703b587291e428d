"""GPT, Llama and Qwen 3 as functions of their weights, sequence by sequence, in FP64.

Shapes: B sequences, S positions, D width, H query heads, G key/value heads, K head width, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.reference.dropout import Dropout
from tests.reference.feed_forward import feed_forward, linear
from tests.reference.initial import mixture_blocks
from tests.reference.mixture import RouterStatistics, mixture
from tests.reference.rotary import turned

Weights = Callable[[str], Tensor]


@dataclass
class Output:
    """``losses_B``: sums over the labelled positions; ``side_loss``: what the routers add; ``logits_BSV``."""

    losses_B: Tensor
    side_loss: Tensor
    logits_BSV: Tensor
    routing: dict[int, RouterStatistics] = field(default_factory=dict)


@dataclass(frozen=True)
class Places:
    """``positions_BS`` in their documents; ``visible_BSS``: whether a query (row) sees a key (column).

    ``real_BS``: whether a token is none of padding.
    """

    positions_BS: Tensor
    visible_BSS: Tensor
    real_BS: Tensor

    @classmethod
    def of(cls, positions_BS: Tensor | None, real_BS: Tensor) -> "Places":
        """Causal; where documents are told apart, a token also sees nothing before its own document's first."""
        count, length = real_BS.shape
        places = torch.arange(length)
        own = places.expand(count, length) if positions_BS is None else positions_BS
        begins_BS = places - own
        seen = (places[None, :] <= places[:, None]) & (places[None, None, :] >= begins_BS[:, :, None])
        return cls(own, seen, real_BS)

    def within(self, window: int) -> "Places":
        """A token sees itself and the ``window`` - 1 positions before it (Jiang et al. 2023)."""
        places = torch.arange(self.visible_BSS.shape[-1])
        near = places[:, None] - places[None, :] < window
        return Places(self.positions_BS, self.visible_BSS & near, self.real_BS)


def run(
    model: dict[str, Any],
    weights: dict[str, Tensor],
    tokens_BS: Tensor,
    labels_BS: Tensor,
    places: Places,
    dropouts: tuple[Dropout, Dropout],
    biases: dict[int, Tensor],
) -> Output:
    """Losses of some sequences. ``dropouts``: of activations and of attention; ``biases``: of the routers, by block."""
    hidden, scores = dropouts
    x = weights["embedding.word.weight"][tokens_BS]
    if model["family"] == "gpt":
        x = x + weights["embedding.position.weight"][places.positions_BS]
    x = hidden.activations(x, "embedding")
    side_loss, routing = torch.zeros((), dtype=torch.float64), {}
    for number in range(model["num_layers"]):
        name = f"layers.{number}"
        normed = _norm(model, weights, f"{name}.attention_norm", x)
        kind = model["blocks"][number % len(model["blocks"])]
        reach = places.within(model["attention.window"]) if kind == "window" else places
        inside = _attention(model, weights, name, normed, reach, scores)
        x = x + hidden.activations(inside, f"{name}.attention.output")
        normed = _norm(model, weights, f"{name}.feed_forward_norm", x)
        if number in mixture_blocks(model):
            arguments = model, weights, f"{name}.feed_forward", normed, places.real_BS, biases.get(number)
            y, lost, routing[number] = mixture(*arguments)
            side_loss = side_loss + lost
        else:
            y = feed_forward(model, weights, f"{name}.feed_forward", normed)
        x = x + hidden.activations(y, f"{name}.feed_forward.output")
    head = weights["embedding.word.weight" if model["tie_embeddings"] else "head.weight"]
    logits = _norm(model, weights, "final_norm", x) @ head[: model["vocab_size"] - model["vocab_padding"]].T
    return Output(_cross_entropies(logits, labels_BS), side_loss, logits, routing)


def _cross_entropies(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    counts = labels_BS >= 0
    right = logits_BSV.gather(-1, labels_BS.clamp(min=0)[..., None])[..., 0]
    return torch.where(counts, logits_BSV.exp().sum(-1).log() - right, 0.0).sum(1)


def _norm(model: dict[str, Any], weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """LayerNorm (Ba et al. 2016) in GPT, RMSNorm (Zhang & Sennrich 2019) in the others."""
    if model["family"] == "gpt":
        x = x - x.mean(-1, keepdim=True)
    normed = x / (x.square().mean(-1, keepdim=True) + model["norm.eps"]).sqrt() * weights[f"{name}.weight"]
    return normed + weights[f"{name}.bias"] if model["family"] == "gpt" else normed


def _attention(
    model: dict[str, Any], weights: dict[str, Tensor], name: str, x_BSD: Tensor, places: Places, dropout: Dropout
) -> Tensor:
    """Vaswani et al. 2017, eq. 1, group by group (Ainslie et al. 2023): its queries, its key, its value."""
    groups, K = model["attention.num_kv_heads"], model["attention.head_width"]
    rows = linear(weights, f"{name}.attention.query_key_value", x_BSD).unflatten(-1, (groups, -1, K))
    query, key, value = rows[..., :-2, :], rows[..., -2, :], rows[..., -1, :]  # B, S, G, (queries,) K
    query = query.flatten(2, 3)
    if model["family"] == "qwen3":  # Yang et al. 2025: each head's query and key have a norm
        query = _norm(model, weights, f"{name}.attention.query_norm", query)
        key = _norm(model, weights, f"{name}.attention.key_norm", key)
    if model["family"] != "gpt":
        query, key = (turned(part, places.positions_BS, model, x_BSD.shape[1]) for part in (query, key))
    each = query.shape[2] // groups
    owner = torch.arange(query.shape[2]) // each  # the key and value of each head
    scores = torch.einsum("bshk,bthk->bhst", query, key[:, :, owner]) / math.sqrt(K)
    chances = scores.masked_fill(~places.visible_BSS[:, None], -math.inf).softmax(-1)
    heads = torch.einsum("bhst,bthk->bshk", dropout.probabilities(chances, f"{name}.attention"), value[:, :, owner])
    return linear(weights, f"{name}.attention.output", heads.flatten(2))
