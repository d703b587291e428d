"""Feed-forward sublayers. Shapes: S sequence, B micro-batch, D width, F feed-forward width."""

import torch.nn.functional as F
from torch import Tensor, nn

from megatrain.parallel.layers import Layers


class GeluFeedForward(nn.Module):
    """down(gelu(up(x))), Radford et al. 2019 (GPT-2; the tanh form of GELU)."""

    def __init__(self, width: int, ffn_width: int, bias: bool, layers: Layers):
        super().__init__()
        self.up = layers.column_linear(width, ffn_width, bias)
        self.down = layers.row_linear(ffn_width, width, bias)

    def forward(self, x_SBD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_SBD), approximate="tanh"))


class SwiGluFeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)), Shazeer 2020, eq. 6."""

    def __init__(self, width: int, ffn_width: int, bias: bool, layers: Layers):
        super().__init__()
        self.layers = layers
        self.gate = layers.column_linear(width, ffn_width, bias)
        self.up = layers.column_linear(width, ffn_width, bias)
        self.down = layers.row_linear(ffn_width, width, bias)

    def forward(self, x_SBD: Tensor) -> Tensor:
        gate, up = self.layers.together((self.gate, self.up), x_SBD)
        return self.down(F.silu(gate) * up)
