"""Self-attention with grouped queries.

Shapes: S sequence (T: of the keys), B micro-batch, D width, H query heads, G key/value heads, K head width.
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from megatrain.models.parts.document_attention import KERNELS
from megatrain.models.parts.documents import Documents, visible_pairs
from megatrain.models.parts.rotary import turn
from megatrain.models.parts.sublayers import MicroBatch, Mixer
from megatrain.parallel.layers import Layers
from megatrain.spec.schema import ModelSpec


class AttentionCore(nn.Module):
    """The heads themselves: the queries of the last S of T positions attend to all positions up to their own.

    Where the sequence holds several documents, each position sees its own document only.
    """

    is_causal = True

    def __init__(self, config: ModelSpec, layers: Layers, site: str):
        super().__init__()
        self.dropout_probability = config.attention.dropout
        self.dropout = layers.attention_dropout(config.attention.dropout, f"{site}.attention")
        self.document_kernel = KERNELS.get(config.attention.documents)

    def forward(
        self,
        query_SBHK: Tensor,
        key_TBGK: Tensor,
        value_TBGK: Tensor,
        keys_B: Tensor | None,
        documents: Documents | None,
    ) -> Tensor:
        """Returns: mixed values [S, B, H, K]."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBHK, key_TBGK, value_TBGK))
        if documents is not None and self.document_kernel is not None:
            return self.document_kernel.attend(query, key, value, documents.plan).permute(2, 0, 1, 3)
        rows, cols = query.shape[-2], key.shape[-2]
        visible = self.visible(documents, rows, cols, query.device)
        if self.training and self.dropout_probability > 0.0:
            mixed = self._attend_with_dropout(query, key, value, keys_B, visible)
        else:
            if visible is None and self.is_causal and rows != cols:
                visible = causal_lower_right(rows, cols)
            is_causal, is_grouped = visible is None and self.is_causal, query.shape[1] > key.shape[1]
            mixed = F.scaled_dot_product_attention(
                query, key, value, visible, is_causal=is_causal, enable_gqa=is_grouped
            )
        return mixed.permute(2, 0, 1, 3)

    def visible(self, documents: Documents | None, rows: int, cols: int, device: torch.device) -> Tensor | None:
        """[..., rows, cols]: whether a query, of the last ``rows`` of ``cols`` positions, sees a key; None: all, or, of
        a causal core, all up to its own."""
        return None if documents is None else visible_pairs(documents, rows, cols)

    def _attend_with_dropout(
        self, query: Tensor, key: Tensor, value: Tensor, keys_B: Tensor | None, visible: Tensor | None
    ) -> Tensor:
        """Dense attention: the fused kernels draw their masks from a generator, ours is a function."""
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        if visible is None and self.is_causal:
            rows, cols = scores.shape[-2:]
            visible = torch.ones(rows, cols, dtype=torch.bool, device=scores.device).tril(cols - rows)
        scores = scores.float() if visible is None else scores.float().masked_fill(~visible, -math.inf)
        weights = scores.softmax(dim=-1)
        return self.dropout(weights, keys_B).to(value.dtype) @ value


class Attention(Mixer):
    """softmax(Q K^T / sqrt(K)) V, Vaswani et al. 2017, eq. 1; groups of Ainslie et al. 2023.

    With ``head_norms`` each head's query and key are normalised before they are turned (Dehghani et al. 2023).

    The rows of ``query_key_value`` stand group by group: the H/G queries of a group, its key, its
    value. So any whole number of groups is one slice of rows.
    """

    is_causal = True
    core_type = AttentionCore

    def __init__(self, config: ModelSpec, layers: Layers, site: str):
        super().__init__()
        part = config.attention
        heads, groups, self.head_width = part.num_heads, part.num_kv_heads, part.head_width
        self.queries_per_group = heads // groups
        self.query_key_value = layers.column_linear(
            config.hidden_size, (heads + 2 * groups) * self.head_width, part.bias
        )
        self.output = layers.row_linear(heads * self.head_width, config.hidden_size, part.bias)
        self.query_norm = self._head_norm(config, layers) if part.head_norms else None
        self.key_norm = self._head_norm(config, layers) if part.head_norms else None
        self.core = layers.attention(self.core_type(config, layers, site))

    def forward(self, x_SBD: Tensor, batch: MicroBatch) -> Tensor:
        groups = self.query_key_value(x_SBD).unflatten(-1, (-1, self.queries_per_group + 2, self.head_width))
        query, key, value = groups.split([self.queries_per_group, 1, 1], dim=-2)  # S, B, G, heads, K
        query, key, value = (x.flatten(2, 3) for x in (query, key, value))  # S, B, H or G, K
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if batch.turns is not None:
            query, key = turn(query, batch.turns), turn(key, batch.turns)
        return self.output(self.core(query, key, value, batch.keys_B, batch.documents).flatten(2))

    def recomputed(self) -> Iterable[nn.Module]:
        return [module for module in self.modules() if isinstance(module, AttentionCore)]

    def _head_norm(self, config: ModelSpec, layers: Layers) -> nn.Module:
        return layers.in_split_region(nn.RMSNorm(self.head_width, config.norm.eps))
