"""Feed-forward sublayers. Shapes: S sequence, B micro-batch, D width, F feed-forward width."""

import torch.nn.functional as F
from torch import Tensor

from megatrain.models.parts.sublayers import FeedForward, MicroBatch
from megatrain.parallel.layers import Layers
from megatrain.spec.schema import ModelSpec


class GeluFeedForward(FeedForward):
    """down(gelu(up(x))), Radford et al. 2019 (GPT-2; the tanh form of GELU)."""

    def __init__(self, width: int, ffn_width: int, bias: bool, layers: Layers):
        super().__init__()
        self.up = layers.column_linear(width, ffn_width, bias)
        self.down = layers.row_linear(ffn_width, width, bias)

    def forward(self, x_SBD: Tensor, batch: MicroBatch) -> Tensor:
        return self.down(F.gelu(self.up(x_SBD), approximate="tanh"))


class ErfGeluFeedForward(GeluFeedForward):
    """The same with GELU as it is defined, x times the normal distribution's function (Hendrycks & Gimpel 2016)."""

    def forward(self, x_SBD: Tensor, batch: MicroBatch) -> Tensor:
        return self.down(F.gelu(self.up(x_SBD)))


class SwiGluFeedForward(FeedForward):
    """down(silu(gate(x)) * up(x)), Shazeer 2020, eq. 6."""

    def __init__(self, width: int, ffn_width: int, bias: bool, layers: Layers):
        super().__init__()
        self.layers = layers
        self.gate = layers.column_linear(width, ffn_width, bias)
        self.up = layers.column_linear(width, ffn_width, bias)
        self.down = layers.row_linear(ffn_width, width, bias)

    def forward(self, x_SBD: Tensor, batch: MicroBatch) -> Tensor:
        gate, up = self.layers.column_outputs((self.gate, self.up), x_SBD)
        return self.down(F.silu(gate) * up)


FEED_FORWARDS: dict[str, type[GeluFeedForward] | type[SwiGluFeedForward]] = {
    "gelu": GeluFeedForward,
    "gelu_erf": ErfGeluFeedForward,
    "swiglu": SwiGluFeedForward,
}
"""By their names in ``model.feed_forward.activation``."""


def build_feed_forward(config: ModelSpec, ffn_width: int, layers: Layers) -> FeedForward:
    """The model's feed-forward, ``ffn_width`` wide."""
    part = config.feed_forward
    return FEED_FORWARDS[part.activation](config.hidden_size, ffn_width, part.bias, layers)
