"""Sliding-window attention (Beltagy et al. 2020, section 3.1, causal; Jiang et al. 2023).

Shapes: S queries, T keys, B micro-batch.
"""

import torch
from torch import Tensor

from megatrain.models.parts.attention import Attention, AttentionCore
from megatrain.models.parts.documents import Documents
from megatrain.parallel.layers import Layers
from megatrain.spec.schema import ModelSpec


class WindowCore(AttentionCore):
    """Each position attends to the last ``attention.window`` positions up to its own."""

    def __init__(self, config: ModelSpec, layers: Layers, site: str):
        super().__init__(config, layers, site)
        self.window = config.attention.window

    def visible(self, documents: Documents | None, rows: int, cols: int, device: torch.device) -> Tensor | None:
        seen = super().visible(documents, rows, cols, device)
        if cols <= self.window:
            return seen
        band_ST = torch.ones(rows, cols, dtype=torch.bool, device=device).triu(cols - rows - self.window + 1)
        return band_ST.tril(cols - rows) if seen is None else seen & band_ST


class WindowAttention(Attention):
    """Attention whose work and reach grow with the window and not with the sequence."""

    core_type = WindowCore
