"""torch.compile of each block by itself, where one compilation serves all, and of the loss."""

import torch
from torch import nn

from megatrain.models.block import Block
from megatrain.models.decoder import Decoder


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
    for module in model.modules():
        _compile(module)
    return None


def _compile(module: nn.Module) -> None:
    """A block, the parts of its sublayers that no graph holds whole, or the loss, where no other rank has a share in
    it: fused, it reads the logits as they are and makes no FP32 copy of them."""
    if isinstance(module, Block):
        module.compile()
        module.attention.compile_parts()
        module.feed_forward.compile_parts()
    elif isinstance(module, Decoder) and module.factory.splits["tp"].size == 1:
        module.losses = torch.compile(module.losses)
