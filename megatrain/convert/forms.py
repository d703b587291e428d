"""How tensors here and their counterparts elsewhere are arranged: exact re-orderings, both ways.

Shapes: V vocabulary, D width, H query heads, G key/value heads, K head width, F feed-forward width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatrain.spec.derive import num_tokens
from megatrain.spec.schema import ModelSpec

Tensors = Sequence[Tensor]


@dataclass(frozen=True)
class Form:
    """A re-ordering and its inverse; each takes and gives the tensors of one line of a name table."""

    to_ours: Callable[[Tensors, ModelSpec], list[Tensor]]
    to_theirs: Callable[[Tensors, ModelSpec], list[Tensor]]


def _same(tensors: Tensors, model: ModelSpec) -> list[Tensor]:
    return list(tensors)


def _transposed(tensors: Tensors, model: ModelSpec) -> list[Tensor]:
    return [tensor.t() for tensor in tensors]


def _padded(tensors: Tensors, model: ModelSpec) -> list[Tensor]:
    rows = tensors[0]
    if rows.shape[0] != num_tokens(model):
        raise ValueError(f"{rows.shape[0]} rows for {num_tokens(model)} tokens")
    return [torch.cat([rows, rows.new_zeros(model.vocab_padding, *rows.shape[1:])])]


def _unpadded(tensors: Tensors, model: ModelSpec) -> list[Tensor]:
    return [tensors[0][: num_tokens(model)]]


def _grouped(tensors: Tensors, model: ModelSpec) -> list[Tensor]:
    """[H K, …], [G K, …], [G K, …] -> [(H + 2 G) K, …], group by group."""
    groups, width = model.attention.num_kv_heads, model.attention.head_width
    parts = [tensor.unflatten(0, (groups, -1, width)) for tensor in tensors]
    return [torch.cat(parts, dim=1).flatten(0, 2)]


def _ungrouped(tensors: Tensors, model: ModelSpec) -> list[Tensor]:
    groups, width = model.attention.num_kv_heads, model.attention.head_width
    whole = tensors[0].unflatten(0, (groups, -1, width))
    return [part.flatten(0, 2) for part in whole.split([model.attention.num_heads // groups, 1, 1], dim=1)]


def _grouped_thirds(tensors: Tensors, model: ModelSpec) -> list[Tensor]:
    """[D, 3 H K] (or the bias [3 H K]): all queries, all keys, all values side by side."""
    return _grouped(tensors[0].t().chunk(3), model)


def _thirds(tensors: Tensors, model: ModelSpec) -> list[Tensor]:
    return [torch.cat(_ungrouped(tensors, model)).t()]


def _halves(tensors: Tensors, model: ModelSpec) -> list[Tensor]:
    """[2 F, D] -> [F, D], [F, D]."""
    return list(tensors[0].chunk(2))


def _stacked(tensors: Tensors, model: ModelSpec) -> list[Tensor]:
    return [torch.cat(list(tensors))]


def _experts_stacked(tensors: Tensors, model: ModelSpec) -> list[Tensor]:
    """E matrices [F, D] -> [E, D, F]."""
    return [torch.stack([tensor.t() for tensor in tensors])]


def _experts_apart(tensors: Tensors, model: ModelSpec) -> list[Tensor]:
    return [matrix.t() for matrix in tensors[0]]


def _experts_transposed(tensors: Tensors, model: ModelSpec) -> list[Tensor]:
    """[E, F, D] <-> [E, D, F]."""
    return [tensor.transpose(1, 2) for tensor in tensors]


def _experts_halves(tensors: Tensors, model: ModelSpec) -> list[Tensor]:
    """[E, 2 F, D] -> [E, D, F], [E, D, F]."""
    return list(tensors[0].transpose(1, 2).chunk(2, dim=2))


def _experts_joined(tensors: Tensors, model: ModelSpec) -> list[Tensor]:
    return [torch.cat(list(tensors), dim=2).transpose(1, 2)]


SAME = Form(_same, _same)
TRANSPOSED = Form(_transposed, _transposed)
VOCABULARY = Form(_padded, _unpadded)
QUERY_KEY_VALUE = Form(_grouped, _ungrouped)
GPT2_THIRDS = Form(_grouped_thirds, _thirds)
EXPERTS = Form(_experts_stacked, _experts_apart)
STACKED_EXPERTS = Form(_experts_transposed, _experts_transposed)
STACKED_GATE_UP = Form(_experts_halves, _experts_joined)
GATE_UP = Form(_halves, _stacked)
