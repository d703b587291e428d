"""Feed-forwards against their formulas."""

import math

import torch
from torch import Tensor

from megatrain.config.schema import ResolvedRun
from megatrain.models.parts.feed_forward import ErfGeluFeedForward, GeluFeedForward, SwiGluFeedForward
from tests.models.parts.suite import FeedForwardSuite, Weights


class TestGelu(FeedForwardSuite):
    """Radford et al. 2019, with GELU's tanh form (Hendrycks & Gimpel 2016)."""

    part, bias = GeluFeedForward, True

    @classmethod
    def expected(cls, weights: Weights, x_SBD: Tensor, positions_BS: Tensor, config: ResolvedRun) -> Tensor:
        up = x_SBD @ weights["up.weight"].T + weights["up.bias"]
        bent = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        return bent @ weights["down.weight"].T + weights["down.bias"]


class TestErfGelu(FeedForwardSuite):
    """GELU as Hendrycks & Gimpel 2016 define it."""

    part, bias = ErfGeluFeedForward, True

    @classmethod
    def expected(cls, weights: Weights, x_SBD: Tensor, positions_BS: Tensor, config: ResolvedRun) -> Tensor:
        up = x_SBD @ weights["up.weight"].T + weights["up.bias"]
        bent = 0.5 * up * (1 + torch.erf(up / math.sqrt(2)))
        return bent @ weights["down.weight"].T + weights["down.bias"]


class TestSwiGlu(FeedForwardSuite):
    """Shazeer 2020, eq. 6."""

    part = SwiGluFeedForward

    @classmethod
    def expected(cls, weights: Weights, x_SBD: Tensor, positions_BS: Tensor, config: ResolvedRun) -> Tensor:
        gate, up = (x_SBD @ weights[f"{name}.weight"].T for name in ("gate", "up"))
        return (gate / (1 + torch.exp(-gate)) * up) @ weights["down.weight"].T
