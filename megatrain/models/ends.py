"""The two ends of a Transformer: where tokens become activations, and where these become logits.

Shapes: S sequence, B micro-batch, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatrain.models.parts.documents import Documents, own_positions
from megatrain.models.parts.norm import build_norm
from megatrain.parallel.layers import Layers
from megatrain.spec.schema import ModelSpec


class Embedding(nn.Module):
    """Word embedding, plus learned positions and token types (Devlin et al. 2019, figure 2) where the model has them,
    normalised where it does so.

    A copy that only lends its rows to the head, ``words_only``, has none but these.
    """

    def __init__(self, config: ModelSpec, layers: Layers, words_only: bool):
        super().__init__()
        width, types = config.hidden_size, config.positions.num_token_types
        self.layers = layers
        self.word = layers.vocab_embedding(config.vocab_size, width)
        learned = config.positions.kind == "learned" and not words_only
        self.position = nn.Embedding(config.max_seq_len, width) if learned else None
        self.token_type = nn.Embedding(types, width) if types and not words_only else None
        self.norm = build_norm(config, layers) if config.norm.embedding and not words_only else nn.Identity()
        self.dropout = layers.dropout(config.dropout, "embedding")

    def forward(self, tokens_BS: Tensor, keys_B: Tensor | None, documents: Documents | None) -> Tensor:
        if self.position is None and self.token_type is None:
            return self.dropout(self.norm(self.layers.embed(self.word, tokens_BS)), keys_B)
        x_SBD = self.word(tokens_BS).transpose(0, 1)
        if self.position is not None:
            own_S = self.layers.positions(tokens_BS.shape[1], tokens_BS.device)
            x_SBD = x_SBD + self.position(own_positions(own_S, documents))
        if self.token_type is not None:
            x_SBD = x_SBD + self.token_type(torch.zeros_like(tokens_BS).transpose(0, 1))
        return self.dropout(self.norm(self.layers.split_sequence(x_SBD.contiguous())), keys_B)


class HeadTransform(nn.Module):
    """norm(gelu(dense(x))): what BERT's published code has between its last block and the output rows."""

    def __init__(self, config: ModelSpec, layers: Layers):
        super().__init__()
        self.dense = layers.on_split_sequence(nn.Linear(config.hidden_size, config.hidden_size))
        self.norm = build_norm(config, layers)

    def forward(self, x_SBD: Tensor) -> Tensor:
        return self.norm(F.gelu(self.dense(x_SBD)))


class Head(nn.Module):
    """What a model has for its output beside the word embedding: rows of its own where it is untied; a layer before
    them and biases where it has a ``head_transform``."""

    def __init__(self, config: ModelSpec, layers: Layers):
        super().__init__()
        if not config.tie_embeddings:
            self.weight: nn.Parameter = layers.vocab_embedding(config.vocab_size, config.hidden_size).weight  # type: ignore[assignment]
        if config.head_transform:
            self.bias = layers.vocab_bias(config.vocab_size)
            self.transform = HeadTransform(config, layers)
