"""Linear maps and feed-forwards."""

import math
from typing import Any

import torch
from torch import Tensor


def linear(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def feed_forward(model: dict[str, Any], weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    up = linear(weights, f"{name}.up", x)
    gate = None if model["family"] == "gpt" else linear(weights, f"{name}.gate", x)
    return linear(weights, f"{name}.down", activated(up, gate))


def activated(up: Tensor, gate: Tensor | None) -> Tensor:
    """GELU's tanh form (Hendrycks & Gimpel 2016), or SwiGLU (Shazeer 2020, eq. 6) where there is a gate."""
    if gate is None:
        return 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
    return gate / (1 + torch.exp(-gate)) * up
