"""A Transformer block.

Shapes: S sequence, B micro-batch, D width.
"""

from torch import Tensor, nn

from megatrain.models.family import FAMILIES, Family
from megatrain.models.parts.attention import Attention
from megatrain.models.parts.documents import Documents
from megatrain.models.parts.mixture import MixtureOfExperts
from megatrain.models.parts.rotary import Turns
from megatrain.parallel.layers import Layers
from megatrain.spec.derive import expert_hidden_size, mixture_layers
from megatrain.spec.schema import ModelConfig


class Block(nn.Module):
    """Pre-norm Transformer block: attention, then feed-forward, each added to the stream."""

    def __init__(self, config: ModelConfig, layers: Layers, number: int):
        super().__init__()
        family, site = FAMILIES[config.family], f"layers.{number}"
        self.attention_norm = layers.on_split_sequence(family.norm(config.hidden_size, config.norm_eps))
        self.attention = Attention(config, layers, site, family.head_norms)
        self.feed_forward_norm = layers.on_split_sequence(family.norm(config.hidden_size, config.norm_eps))
        self.has_experts = number in mixture_layers(config)
        self.feed_forward = _mixture(config, family, layers) if self.has_experts else _dense(config, family, layers)
        self.attention_dropout = layers.dropout(config.dropout, f"{site}.attention.output")
        self.feed_forward_dropout = layers.dropout(config.dropout, f"{site}.feed_forward.output")

    def forward(
        self,
        x_SBD: Tensor,
        keys_B: Tensor | None,
        documents: Documents | None,
        turns: Turns | None,
        lengths_B: Tensor | None = None,
    ) -> Tensor:
        mixed = self.attention(self.attention_norm(x_SBD), keys_B, documents, turns)
        x = x_SBD + self.attention_dropout(mixed, keys_B)
        normed = self.feed_forward_norm(x)
        fed = self.feed_forward(normed, lengths_B) if self.has_experts else self.feed_forward(normed)
        return x + self.feed_forward_dropout(fed, keys_B)


def _dense(config: ModelConfig, family: Family, layers: Layers) -> nn.Module:
    assert config.ffn_hidden_size is not None, "resolve the config first"
    return family.feed_forward(config.hidden_size, config.ffn_hidden_size, family.bias, layers)


def _mixture(config: ModelConfig, family: Family, layers: Layers) -> MixtureOfExperts:
    width = config.num_shared_experts * expert_hidden_size(config)
    shared = family.feed_forward(config.hidden_size, width, family.bias, layers) if width else None
    return MixtureOfExperts(config, layers, family.experts(config, layers), shared)
