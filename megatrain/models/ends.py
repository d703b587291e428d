"""The two ends of a Transformer: where tokens become activations, and where these become logits.

Shapes: S sequence, B micro-batch, D width.
"""

from torch import Tensor, nn

from megatrain.models.parts.documents import Documents, own_positions
from megatrain.parallel.layers import Layers
from megatrain.spec.schema import ModelSpec


class Embedding(nn.Module):
    """Word embedding, plus learned positions where the model has them, and ``has_positions`` this copy."""

    def __init__(self, config: ModelSpec, layers: Layers, has_positions: bool):
        super().__init__()
        self.layers = layers
        self.word = layers.vocab_embedding(config.vocab_size, config.hidden_size)
        learned = has_positions and config.positions.kind == "learned"
        self.position = nn.Embedding(config.max_seq_len, config.hidden_size) if learned else None
        self.dropout = layers.dropout(config.dropout, "embedding")

    def forward(self, tokens_BS: Tensor, keys_B: Tensor | None, documents: Documents | None) -> Tensor:
        if self.position is None:
            return self.dropout(self.layers.embed(self.word, tokens_BS), keys_B)
        own_S = self.layers.positions(tokens_BS.shape[1], tokens_BS.device)
        x_SBD = self.word(tokens_BS).transpose(0, 1) + self.position(own_positions(own_S, documents))
        return self.dropout(self.layers.split_sequence(x_SBD.contiguous()), keys_B)


class Head(nn.Module):
    """Output projection of an untied model."""

    def __init__(self, config: ModelSpec, layers: Layers):
        super().__init__()
        self.weight: nn.Parameter = layers.vocab_embedding(config.vocab_size, config.hidden_size).weight  # type: ignore[assignment]
