"""FP32 weights that a rank holds whole are their own masters: torch's optimizer updates them as they are."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatrain.config.schema import ResolvedRun
from megatrain.engine.zero.fragments import Fragment, OwnFragment
from megatrain.engine.zero.norm import sum_of_squares
from megatrain.engine.zero.runtime import Moments, Runtime, Updated
from megatrain.parallel.marks import marks_of
from megatrain.parallel.mesh import Mesh
from megatrain.spec.kinds import WEIGHT

Pieces = list[tuple[Tensor, nn.Parameter]]
"""(gradient, the parameter that it is of, or of a part of)."""


def needs_no_deepspeed(config: ResolvedRun) -> bool:
    """Whether nothing of a run is offloaded, rounded or asked of DeepSpeed, and at most the optimizer's state is
    sharded: then nobody need drive torch's optimizer."""
    offload = config.offload
    here = offload.optimizer == "none" and offload.parameters == "none" and config.optimizer.name != "cpu_adamw"
    return config.precision.dtype == "fp32" and config.parallel.zero_stage <= 1 and here and not config.deepspeed


class WholeRuntime(Runtime):
    """Without DeepSpeed: no flat buffers, no copies of the weights, nothing reduced over one rank."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, moments: Moments, clip_norm: float, mesh: Mesh
    ):
        super().__init__(optimizer, moments)
        self._model, self._mesh, self._clip_norm = model, mesh, clip_norm
        self._first_of_tensor = mesh.coordinate("tp") == 0
        self._norm_groups = [mesh.expert_model_group]
        self._num_norms = self._most_groups()

    @property
    def clip_norm(self) -> float:
        return self._clip_norm

    @clip_norm.setter
    def clip_norm(self, norm: float) -> None:
        self._clip_norm = norm

    def forward(self, *inputs: Any) -> Tensor:
        return self._model(*inputs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    @torch.no_grad()
    def step(self) -> Updated:
        norm = self._norm(self._reduce())
        excess = (norm + 1e-6) / self._clip_norm if self._clip_norm > 0 else torch.zeros_like(norm)
        applied, clips = torch.stack([norm.isfinite(), excess > 1.0]).tolist()  # the step's one wait for the device
        held = [weight for group in self.param_groups for weight in group["params"]]
        if applied:
            if clips:
                torch._foreach_mul_([weight.grad for weight in held], 1.0 / excess)
            self.base_optimizer.step()
            self.finish_import()
        for weight in (*held, *self.moments):
            weight.grad = None
        return Updated(applied, norm)

    def _reduce(self) -> list[Pieces]:
        """Leaves the gradients of what this rank updates in ``.grad``, and returns them group by group."""
        return [[(gradient_of(weight), weight) for weight in group["params"]] for group in self.param_groups]

    def _norm(self, groups: list[Pieces]) -> Tensor:
        """The norm of the gradients of the whole model, each element of it counted once. Collective."""
        squares = [sum_of_squares([g for g, weight in pieces if self._counts(weight)]) for pieces in groups]
        squares += [torch.zeros(()) for _ in range(self._num_norms - len(squares))]
        squares = [square.to(self._mesh.device) for square in squares]
        # the sum over ranks of each group by itself, as DeepSpeed has it: so both come to the same bits
        for ranks in self._norm_groups:
            if dist.get_world_size(ranks) > 1:
                for square in squares:
                    dist.all_reduce(square, group=ranks)
        norm = torch.linalg.vector_norm(torch.stack(squares).sqrt())
        return torch.where(norm.isfinite(), norm, torch.inf)

    def _counts(self, weight: nn.Parameter) -> bool:
        """Whether this rank's gradient of ``weight`` counts in the norm: of copies, one does."""
        marks = marks_of(weight)
        return not marks.counted_elsewhere and (marks.tensor_dim is not None or self._first_of_tensor)

    def _most_groups(self) -> int:
        """Of any rank of the model: a pipeline's stage may lack some. Collective where there are stages."""
        own = len(self.param_groups)
        if self._mesh.topology.pp == 1:
            return own
        most = torch.tensor(own, device=self._mesh.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=self._mesh.expert_model_group)
        return int(most)

    def fragment(self, name: str, parameter: nn.Parameter) -> Fragment | None:
        return OwnFragment(
            name, parameter, 0, parameter.numel(), parameter, self.base_optimizer.state.get(parameter, {})
        )

    def whole(self, parameter: nn.Parameter, kind: str) -> Tensor:
        return parameter.detach() if kind == WEIGHT else self.base_optimizer.state[parameter][kind]


def gradient_of(weight: nn.Parameter) -> Tensor:
    """The gradient of ``weight``; zeros where the loss did not depend on it, which still decays."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad
