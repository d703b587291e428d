"""Initial weights as a function of (seed, canonical parameter name) alone, so no layout changes them."""

import hashlib
import math

import torch
from torch import Tensor, nn

from megatrain.parallel.layers import Layers
from megatrain.spec.schema import ModelConfig

_RESIDUAL_OUTPUTS = (
    "attention.output.weight",
    "feed_forward.down.weight",
    "feed_forward.experts.down",
    "feed_forward.shared.down.weight",
)


@torch.no_grad()
def initialize(model: nn.Module, config: ModelConfig, seed: int, layers: Layers) -> None:
    """Fills every parameter: normal(0, init_std) matrices, the outputs of residual branches
    divided by sqrt(2 num_layers) (Radford et al. 2019), ones in norms, zeros in biases."""
    for name, parameter in model.named_parameters():
        whole = _initial(name, layers.whole_shape(parameter), config, seed)
        parameter.copy_(layers.local_part(whole, parameter))


def _initial(name: str, shape: tuple[int, ...], config: ModelConfig, seed: int) -> Tensor:
    if name.endswith("bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    std = config.init_std
    if name.endswith(_RESIDUAL_OUTPUTS):
        std /= math.sqrt(2 * config.num_layers)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator) * std
