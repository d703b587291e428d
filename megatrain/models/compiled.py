"""torch.compile of each block by itself: one compilation serves all."""

import torch
from torch import nn

from megatrain.models.decoder import Block


def compile_blocks(model: nn.Module) -> str | None:
    """Compiles the blocks, if this machine can: on a CPU that takes a C++ compiler.

    Returns: why not, when they stay as they are.
    """
    device = next(model.parameters()).device
    try:
        torch.compile(lambda x: x + 1)(torch.ones(8, device=device))
    except Exception as error:  # whatever a missing compiler, header or driver raises
        torch._dynamo.reset()
        return str(error).strip().splitlines()[0]
    for block in model.modules():
        if isinstance(block, Block):
            block.compile()
    return None
