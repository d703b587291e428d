"""Attention in both directions, as in encoders (Vaswani et al. 2017, section 3.2.3; Devlin et al. 2019).

Shapes: S positions, B micro-batch.
"""

import torch
from torch import Tensor

from megatrain.models.parts.attention import Attention, AttentionCore
from megatrain.models.parts.documents import Documents, same_document
from megatrain.parallel.layers import Layers
from megatrain.spec.schema import ModelSpec


class BidirectionalCore(AttentionCore):
    """Each position attends to all positions of its document; padding is a document of its own."""

    is_causal = False

    def __init__(self, config: ModelSpec, layers: Layers, site: str):
        super().__init__(config, layers, site)
        self.document_kernel = None  # they let a token see what comes before it alone

    def visible(self, documents: Documents | None, rows: int, cols: int, device: torch.device) -> Tensor | None:
        return None if documents is None else same_document(documents, rows, cols).unsqueeze(1)


class BidirectionalAttention(Attention):
    """Attention of which the queries of all positions, and their keys, must be on one rank."""

    is_causal = False
    core_type = BidirectionalCore
