"""What the engine asks of the one who runs its model, sums the gradients, updates the weights and holds their state."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatrain.engine.zero.fragments import Fragment
from megatrain.spec.kinds import MOMENTS

Named = list[tuple[str, nn.Parameter]]
Moments = dict[nn.Parameter, tuple[str, ...]]


class Updated(NamedTuple):
    """``applied``: the gradients were finite, so the weights moved, on all ranks; ``grad_norm``: before clipping."""

    applied: bool
    grad_norm: Tensor


class Runtime:
    """One class for each way in which the state may lie: DeepSpeed's optimizers, and whole weights of our own.

    ``base_optimizer``: torch's, whose groups hold flat partitions where the state is sharded; ``moments``: what it
    keeps of each parameter, by kind.
    """

    def __init__(self, base_optimizer: torch.optim.Optimizer, moments: Moments):
        self.base_optimizer, self.moments = base_optimizer, moments

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, where learning rates are set."""
        return self.base_optimizer.param_groups

    @property
    def clip_norm(self) -> float:
        """The gradient norm from which on gradients are clipped; 0: never."""
        raise NotImplementedError

    @clip_norm.setter
    def clip_norm(self, norm: float) -> None:
        raise NotImplementedError

    # the passes

    def forward(self, *inputs: Any) -> Tensor:
        """The losses [B] of a micro-batch."""
        raise NotImplementedError

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of ``loss`` to those of the step."""
        raise NotImplementedError

    def begin_schedule(self) -> None:
        """To be called before a pipeline's schedule, which runs the passes of all micro-batches itself."""

    def collect_gradients(self) -> None:
        """Adds what stands in ``.grad`` to the sums of the step, where no hook of the backward pass does."""

    def accumulated_gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """This rank's summed gradient of the step so far."""
        return parameter.grad

    def step(self) -> Updated:
        """Reduces the gradients over the ranks that share the state, clips them and updates. Collective."""
        raise NotImplementedError

    # the loss scale

    @property
    def loss_scale(self) -> float:
        """Factor on the loss in FP16, else 1."""
        return 1.0

    def loss_scaler_state(self) -> dict[str, float]:
        """The dynamic loss scaler's numbers, for a checkpoint; empty but in FP16."""
        return {}

    def load_loss_scaler_state(self, state: dict[str, float]) -> None:
        """Goes on with the numbers of a checkpoint."""

    # the state

    def fragment(self, name: str, parameter: nn.Parameter) -> Fragment | None:
        """What this rank holds of a parameter; None: nothing."""
        raise NotImplementedError

    def whole(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """All of a parameter's weight or moment, FP32. Collective over the ranks that share the state."""
        raise NotImplementedError

    def moments_exist(self) -> bool:
        """Whether the optimizer has made its moments, in its first step or in ``make_moments``."""
        return any(kind in state for state in self.base_optimizer.state.values() for kind in MOMENTS)

    def make_moments(self) -> None:
        """Creates the moments that the optimizer would create in its first step."""
        for group in self.base_optimizer.param_groups:
            for held in group["params"]:
                self.base_optimizer.state[held] = empty_moments(held, group)
        self.link_moments()

    def link_moments(self) -> None:
        """Lets fragments find the moments that have been made since the last call."""

    def finish_import(self) -> None:
        """Carries the FP32 weights over to those of the step. Collective."""

    def close(self) -> None:
        """Takes what it changed out of the process."""


def empty_moments(held: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
    """The optimizer's state of ``held``, a weight or a flat partition, before its first step."""
    zeros = {kind: torch.zeros_like(held, requires_grad=False) for kind in group["moments"]}
    fused = group.get("fused", False)  # its kernel reads the count where the weights are
    return {"step": torch.zeros((), device=held.device if fused else "cpu"), **zeros}
