"""Rounding, imitated: every module's results and every gradient are off by up to one unit in the last place.

A layout rounds in other places and sums in another order; what that can do to a number downstream, no constant says.
So the reference is run again with noise of that size, as in TTrace (arXiv 2506.09280, section 4): what the noise does,
rounding may do.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from megatrain.engine.engine import Engine

UNITS = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Relative size of the noise. In 16 bits one unit in the last place: a split matrix product rounds its parts. In FP32
two: nothing is rounded that else is not, but sums of hundreds of terms run in another order."""


def disturb(engine: Engine, draw: int) -> None:
    """Lets all modules but those that give out losses round otherwise, in both directions of the step, and all
    gradients of weights. Ranks that share matrices draw the same, so copies stay copies."""
    mesh = engine.mesh
    generator = torch.Generator(mesh.device).manual_seed(draw * 1_000_003 + mesh.rank // mesh.topology.tp)

    def noisy(x: Tensor) -> Tensor:
        noise = torch.rand(x.shape, generator=generator, device=x.device) * 2 - 1
        return (x.float() * (1 + UNITS[x.dtype] * noise)).to(x.dtype)

    for part in engine.model.parts:
        for module in part.modules():
            if module is not part:
                module.register_forward_hook(_after(noisy))
    for _, parameter in engine.parameters:
        parameter.register_hook(noisy)


def _after(noisy: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, Tensor) and output.dtype in UNITS:
            return noisy(output)
        if type(output) is tuple and isinstance(output[0], Tensor) and output[0].dtype in UNITS:
            return (noisy(output[0]), *output[1:])  # a linear layer beside its bias
        return None

    return hook
