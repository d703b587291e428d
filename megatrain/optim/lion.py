"""Lion: the sign of an interpolation of gradient and momentum."""

from collections.abc import Iterable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, algorithm 2. Each element by itself, so any partition of the weights gives the same.

    State: ``exp_avg``, the momentum, and ``step``, the updates so far, for checkpoints alone. Wants about a third to a
    tenth of AdamW's learning rate.
    """

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float], weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of all weights that have a gradient."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if "exp_avg" not in state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(weight, requires_grad=False)
                state["step"] += 1
                momentum, gradient = state["exp_avg"], weight.grad.to(weight.dtype)
                direction = torch.lerp(gradient, momentum, beta1).sign_()
                weight.mul_(1.0 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
                momentum.lerp_(gradient, 1.0 - beta2)
