"""Sliding-window attention (Beltagy et al. 2020, section 3.1, causal; Jiang et al. 2023).

Shapes: S queries, T keys, B micro-batch.
"""

import torch
from torch import Tensor

from megatrain.models.parts.attention import Attention, AttentionCore
from megatrain.models.parts.documents import Documents, between
from megatrain.parallel.layers import Layers
from megatrain.spec.schema import ModelSpec

_AT_ONCE = 64
"""Queries that are worth a product of their own, however small the window."""


class WindowCore(AttentionCore):
    """Each position attends to the last ``attention.window`` positions up to its own.

    Some queries after the other, each with the keys that any of them sees: so the work grows with S times the window.
    """

    def __init__(self, config: ModelSpec, layers: Layers, site: str):
        super().__init__(config, layers, site)
        self.window = config.attention.window

    def forward(
        self,
        query_SBHK: Tensor,
        key_TBGK: Tensor,
        value_TBGK: Tensor,
        keys_B: Tensor | None,
        documents: Documents | None,
    ) -> Tensor:
        rows, cols, step = query_SBHK.shape[0], key_TBGK.shape[0], max(self.window, _AT_ONCE)
        if cols <= step or (self.training and self.dropout_probability > 0.0):  # a mask counts from the first position
            return super().forward(query_SBHK, key_TBGK, value_TBGK, keys_B, documents)
        mixed: list[Tensor] = []
        for query in query_SBHK.split(step):
            place = cols - rows + step * len(mixed)  # of the first of them
            begin, end = max(0, place - self.window + 1), place + len(query)
            near = None if documents is None else between(documents, begin, end)
            mixed.append(super().forward(query, key_TBGK[begin:end], value_TBGK[begin:end], keys_B, near))
        return torch.cat(mixed)

    def visible(self, documents: Documents | None, rows: int, cols: int, device: torch.device) -> Tensor | None:
        seen = super().visible(documents, rows, cols, device)
        if cols <= self.window:
            return seen
        band_ST = torch.ones(rows, cols, dtype=torch.bool, device=device).triu(cols - rows - self.window + 1)
        return band_ST.tril(cols - rows) if seen is None else seen & band_ST


class WindowAttention(Attention):
    """Attention that reaches back so far and no further."""

    core_type = WindowCore
