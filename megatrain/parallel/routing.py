"""What a router keeps beside its weight: its losses' way into the gradient, its statistics, its balance bias.

Shapes: S sequence, B micro-batch, E experts, k experts of a token.
"""

from typing import Any

import torch
from torch import Tensor, nn


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, loss: Tensor, counts: Tensor, state: "RouterState"
    ) -> Tensor:
        ctx.counts, ctx.state, ctx.dtype = counts, state, loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        ctx.state.statistics += ctx.counts
        return gradient, ctx.state.loss_factor.to(ctx.dtype), None, None


class RouterState(nn.Module):
    """State of one router on one rank.

    Plain tensors and not buffers: a model that is cast to BF16 must not take them along. ``bias_E`` moves the choice
    of experts, see engine/routing.py; None: there is no balance bias. ``gradient_share``:
    the part of the side losses' gradient that is this rank's, where ranks that hold the same tokens sum theirs.
    """

    def __init__(self, num_experts: int, gradient_share: float = 1.0):
        super().__init__()
        self.num_experts, self.gradient_share = num_experts, gradient_share
        self.bias_E: Tensor | None = None
        self.loss_factor = torch.zeros(())
        self.statistics = torch.zeros(num_experts + 3, dtype=torch.float64)

    def begin_step(self, loss_factor: Tensor) -> None:
        """``loss_factor``: what the sum of token losses is multiplied by before its backward pass."""
        self.loss_factor.fill_(loss_factor * self.gradient_share)
        self.statistics.zero_()

    def attach(self, x: Tensor, loss: Tensor, counts: Tensor) -> Tensor:
        """``x`` as it is; in the backward pass ``loss`` (scalar) gets its gradient, as if added to the token losses,
        and ``counts`` go into the step's statistics: once, however often the forward pass is computed again."""
        return _Attached.apply(x, loss, counts, self)  # type: ignore[no-any-return]

    @torch.no_grad()
    def count(self, chosen_SBE: Tensor, kept_SBE: Tensor, probabilities_SBE: Tensor, real_SB1: Tensor | None) -> Tensor:
        """Statistics [E + 3] of some tokens: choices of each expert, dropped choices, entropy, number of tokens.

        Args:
            real_SB1: which tokens are no padding, whose rows elsewhere are zeros; None: all.
        """
        chosen_E = chosen_SBE.sum((0, 1))
        entropy = torch.special.entr(probabilities_SBE).sum()
        dropped = chosen_E.sum() - kept_SBE.sum()
        size = probabilities_SBE.shape[0] * probabilities_SBE.shape[1]
        tokens = torch.full_like(entropy, size) if real_SB1 is None else real_SB1.sum().to(entropy.dtype)
        return torch.cat([chosen_E, torch.stack([dropped, entropy, tokens])]).double()


def forget_statistics(model: nn.Module) -> None:
    """Starts the statistics of all routers in ``model`` anew."""
    for module in model.modules():
        if isinstance(module, RouterState):
            module.statistics.zero_()
