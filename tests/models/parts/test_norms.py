"""Norms against their formulas, with an epsilon that counts."""

from torch import Tensor

from megatrain.config.schema import ResolvedRun
from megatrain.models.parts.norm import LayerNorm, RMSNorm
from tests.models.parts.suite import EPS, NormSuite, Weights


class TestLayerNorm(NormSuite):
    """Ba et al. 2016."""

    part = LayerNorm

    @classmethod
    def expected(cls, weights: Weights, x_SBD: Tensor, positions_BS: Tensor, config: ResolvedRun) -> Tensor:
        centred = x_SBD - x_SBD.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weights["weight"] + weights["bias"]


class TestRMSNorm(NormSuite):
    """Zhang & Sennrich 2019."""

    part = RMSNorm

    @classmethod
    def expected(cls, weights: Weights, x_SBD: Tensor, positions_BS: Tensor, config: ResolvedRun) -> Tensor:
        return x_SBD / (x_SBD.square().mean(-1, keepdim=True) + EPS).sqrt() * weights["weight"]
