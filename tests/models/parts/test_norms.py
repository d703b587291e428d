"""Norms against their formulas, with an epsilon that counts."""

from torch import Tensor, nn

from megatrain.config.schema import RunConfig
from megatrain.models.parts.norm import LayerNorm, RMSNorm
from megatrain.parallel.layers import Layers
from tests.models.parts.suite import WIDTH, NormSuite, Weights

EPS = 0.5


class TestLayerNorm(NormSuite):
    """Ba et al. 2016."""

    @classmethod
    def build(cls, config: RunConfig, layers: Layers) -> nn.Module:
        return LayerNorm(WIDTH, eps=EPS)

    @classmethod
    def expected(cls, weights: Weights, x_SBD: Tensor, positions_BS: Tensor, config: RunConfig) -> Tensor:
        centred = x_SBD - x_SBD.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weights["weight"] + weights["bias"]


class TestRMSNorm(NormSuite):
    """Zhang & Sennrich 2019."""

    @classmethod
    def build(cls, config: RunConfig, layers: Layers) -> nn.Module:
        return RMSNorm(WIDTH, eps=EPS)

    @classmethod
    def expected(cls, weights: Weights, x_SBD: Tensor, positions_BS: Tensor, config: RunConfig) -> Tensor:
        return x_SBD / (x_SBD.square().mean(-1, keepdim=True) + EPS).sqrt() * weights["weight"]
