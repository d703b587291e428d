"""Initial weights as a function of (seed, canonical parameter name) alone, so no layout changes them."""

import hashlib
import math

import torch
from torch import Tensor, nn

from megatrain.parallel.layers import Layers
from megatrain.spec.parameter import Parameter
from megatrain.spec.parts import parameters
from megatrain.spec.schema import ModelSpec


@torch.no_grad()
def initialize(model: nn.Module, config: ModelSpec, seed: int, layers: Layers) -> None:
    """Fills every parameter of ``model``, a part of the whole, as the table of its parts says.

    Raises:
        LookupError: the table lacks a parameter.
    """
    table = parameters(config)
    for name, parameter in model.named_parameters():
        if name not in table:
            raise LookupError(
                f"{name} has no initial weights: it is not in the table of parts (megatrain/spec/parts.py)"
            )
        parameter.copy_(layers.local_part(_initial(table[name], config, seed), parameter))


def _initial(entry: Parameter, config: ModelSpec, seed: int) -> Tensor:
    """The whole tensor."""
    if entry.initial == "zeros":
        return torch.zeros(entry.shape)
    if entry.initial == "ones":
        return torch.ones(entry.shape)
    std = config.init_std
    if entry.initial == "residual":
        std /= math.sqrt(2 * config.num_layers)
    digest = hashlib.sha256(f"{seed}/{entry.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(entry.shape, generator=generator) * std
