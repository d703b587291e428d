"""The experts of a mixture: E feed-forwards whose matrices are stacked, each for its own tokens.

Shapes: T tokens, D width, F expert width, E experts, k experts of a token, N rows, expert by expert.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatrain.parallel.layers import Layers
from megatrain.spec.schema import ModelSpec


class GeluExperts(nn.Module):
    """down_e(gelu(up_e(x))), without biases."""

    def __init__(self, config: ModelSpec, layers: Layers):
        super().__init__()
        width, expert_width = config.hidden_size, config.experts.hidden_size
        self.activate: Callable[..., Tensor] = gelu
        self.exchange = layers.expert_exchange(config.experts.num_experts, drops=config.experts.capacity is not None)
        self.up = layers.expert_matrices(config.experts.num_experts, width, expert_width, split=2)
        self.down = layers.expert_matrices(config.experts.num_experts, expert_width, width, split=1)

    def forward(self, x_TD: Tensor, experts_Tk: Tensor, gates_Tk: Tensor) -> Tensor:
        """sum of gate x expert(x) over the experts of each token; expert number E stands for none."""
        return self.exchange(x_TD, experts_Tk, gates_Tk, self.compute)

    def compute(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        """All experts on their rows, of which they have ``counts_E``."""
        hidden = self.activate(grouped_matmul(x_ND, self.up, counts_E))
        return grouped_matmul(hidden, self.down, counts_E)


class ErfGeluExperts(GeluExperts):
    """The same with GELU as it is defined."""

    def __init__(self, config: ModelSpec, layers: Layers):
        super().__init__(config, layers)
        self.activate = F.gelu


class SwiGluExperts(GeluExperts):
    """down_e(silu(gate_e(x)) * up_e(x))."""

    def __init__(self, config: ModelSpec, layers: Layers):
        super().__init__(config, layers)
        self.activate = gated_silu
        width, expert_width = config.hidden_size, config.experts.hidden_size
        self.gate = layers.expert_matrices(config.experts.num_experts, width, expert_width, split=2)

    def compute(self, x_ND: Tensor, counts_E: Tensor) -> Tensor:
        hidden = self.activate(grouped_matmul(x_ND, self.up, counts_E), grouped_matmul(x_ND, self.gate, counts_E))
        return grouped_matmul(hidden, self.down, counts_E)


EXPERTS: dict[str, type[GeluExperts]] = {"gelu": GeluExperts, "gelu_erf": ErfGeluExperts, "swiglu": SwiGluExperts}
"""By their names in ``model.feed_forward.activation``."""


def gelu(up_NF: Tensor) -> Tensor:
    return F.gelu(up_NF, approximate="tanh")


def gated_silu(up_NF: Tensor, gate_NF: Tensor) -> Tensor:
    return F.silu(gate_NF) * up_NF


def grouped_matmul(x_ND: Tensor, weight_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """Each expert's rows times its matrix: [N, F]. torch's kernel takes rows of whole 16 bytes; a loop the others."""
    weight_EDF = weight_EDF.to(x_ND.dtype)
    if len(x_ND) and all(size * x_ND.element_size() % 16 == 0 for size in weight_EDF.shape[1:]):
        return F.grouped_mm(x_ND, weight_EDF, offs=counts_E.cumsum(0).int())
    parts = zip(x_ND.split(counts_E.tolist()), weight_EDF, strict=True)
    return torch.cat([rows @ matrix for rows, matrix in parts])
