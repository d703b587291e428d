"""Norms that also take a residual stream wider than their weights: they compute in its type and return their own."""

import torch.nn.functional as F
from torch import Tensor, nn

from megatrain.parallel.layers import Layers
from megatrain.spec.schema import ModelSpec


class LayerNorm(nn.LayerNorm):
    """Ba et al. 2016."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps).to(self.weight.dtype)


class RMSNorm(nn.RMSNorm):
    """Zhang & Sennrich 2019."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps).to(self.weight.dtype)


NORMS: dict[str, type[LayerNorm] | type[RMSNorm]] = {"layer_norm": LayerNorm, "rms_norm": RMSNorm}
"""By their names in ``model.norm.kind``."""


def build_norm(config: ModelSpec, layers: Layers) -> nn.Module:
    """A norm of the stream, whose sequence may be split over ranks."""
    return layers.on_split_sequence(NORMS[config.norm.kind](config.hidden_size, config.norm.eps))
