"""A Transformer block.

Shapes: S sequence, B micro-batch, D width.
"""

from torch import Tensor, nn

from megatrain.models.parts.feed_forward import build_feed_forward
from megatrain.models.parts.mixers import build_mixer
from megatrain.models.parts.mixture import build_mixture
from megatrain.models.parts.norm import build_norm
from megatrain.models.parts.sublayers import FeedForward, MicroBatch
from megatrain.parallel.layers import Layers
from megatrain.spec.derive import mixture_layers
from megatrain.spec.schema import ModelSpec


class Block(nn.Module):
    """Pre-norm Transformer block: attention, then feed-forward, each added to the stream."""

    def __init__(self, config: ModelSpec, layers: Layers, number: int):
        super().__init__()
        site = f"layers.{number}"
        self.attention_norm = build_norm(config, layers)
        self.attention = build_mixer(config, layers, number)
        self.feed_forward_norm = build_norm(config, layers)
        self.feed_forward: FeedForward
        if number in mixture_layers(config):
            self.feed_forward = build_mixture(config, layers)
        else:
            self.feed_forward = build_feed_forward(config, config.feed_forward.hidden_size, layers)
        self.attention_dropout = layers.dropout(config.dropout, f"{site}.attention.output")
        self.feed_forward_dropout = layers.dropout(config.dropout, f"{site}.feed_forward.output")

    def forward(self, x_SBD: Tensor, batch: MicroBatch) -> Tensor:
        mixed = self.attention(self.attention_norm(x_SBD), batch)
        x = x_SBD + self.attention_dropout(mixed, batch.keys_B)
        fed = self.feed_forward(self.feed_forward_norm(x), batch)
        return x + self.feed_forward_dropout(fed, batch.keys_B)


class PostNormBlock(Block):
    """The same with each norm behind the sum (Vaswani et al. 2017, section 3.1)."""

    def forward(self, x_SBD: Tensor, batch: MicroBatch) -> Tensor:
        mixed = self.attention(x_SBD, batch)
        x = self.attention_norm(x_SBD + self.attention_dropout(mixed, batch.keys_B))
        fed = self.feed_forward(x, batch)
        return self.feed_forward_norm(x + self.feed_forward_dropout(fed, batch.keys_B))


BLOCKS = {"pre": Block, "post": PostNormBlock}
"""By their names in ``model.norm.placement``."""


def build_block(config: ModelSpec, layers: Layers, number: int) -> Block:
    """Block ``number`` of the model."""
    return BLOCKS[config.norm.placement](config, layers, number)
