"""FP32 weights that a rank holds whole are their own masters: torch's optimizer updates them as they are."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatrain.config.schema import ResolvedRun
from megatrain.engine.zero.fragments import Fragment, WholeFragment
from megatrain.engine.zero.norm import sum_of_squares
from megatrain.engine.zero.runtime import Moments, Runtime, Updated
from megatrain.parallel.marks import marks_of
from megatrain.parallel.mesh import Mesh
from megatrain.spec.kinds import WEIGHT


def holds_whole_weights(config: ResolvedRun) -> bool:
    """Whether nothing of a run is sharded, offloaded, rounded or asked of DeepSpeed, so that nobody need drive torch's
    optimizer."""
    parallel, offload = config.parallel, config.offload
    sharded = parallel.zero_stage > 1 or (parallel.zero_stage == 1 and parallel.cp * parallel.dp > 1)
    here = offload.optimizer == "none" and offload.parameters == "none" and config.optimizer.name != "cpu_adamw"
    return config.precision.dtype == "fp32" and not sharded and here and not config.deepspeed


class WholeRuntime(Runtime):
    """Without DeepSpeed: no flat buffers, no copies of the weights, nothing reduced over one rank."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, moments: Moments, clip_norm: float, mesh: Mesh
    ):
        super().__init__(optimizer, moments)
        self._model, self._mesh, self._clip_norm = model, mesh, clip_norm
        self._first_of_tensor = mesh.coordinate("tp") == 0
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
        groups = [[_gradient(weight) for weight in group["params"]] for group in self.param_groups]
        norm = self._norm(groups)
        excess = (norm + 1e-6) / self._clip_norm if self._clip_norm > 0 else torch.zeros_like(norm)
        applied, clips = torch.stack([norm.isfinite(), excess > 1.0]).tolist()  # the step's one wait for the device
        if applied:
            if clips:
                torch._foreach_mul_([gradient for group in groups for gradient in group], 1.0 / excess)
            self.base_optimizer.step()
        for weight in self.moments:
            weight.grad = None
        return Updated(applied, norm)

    def _norm(self, groups: list[list[Tensor]]) -> Tensor:
        """The norm of the gradients of the whole model, each element of it counted once. Collective."""
        squares = [
            sum_of_squares([g for g, weight in zip(gradients, group["params"], strict=True) if self._counts(weight)])
            for gradients, group in zip(groups, self.param_groups, strict=True)
        ]
        device = self._mesh.device
        # the sum over ranks of each group by itself, as DeepSpeed has it: so both come to the same bits
        squares = [s.to(device) for s in squares] + [
            torch.zeros((), device=device) for _ in range(self._num_norms - len(squares))
        ]
        if dist.get_world_size(self._mesh.expert_model_group) > 1:
            for square in squares:
                dist.all_reduce(square, group=self._mesh.expert_model_group)
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
        state = self.base_optimizer.state.get(parameter, {})
        return WholeFragment(name, parameter, 0, parameter.numel(), state)

    def whole(self, parameter: nn.Parameter, kind: str) -> Tensor:
        return parameter.detach() if kind == WEIGHT else self.base_optimizer.state[parameter][kind]


def _gradient(weight: nn.Parameter) -> Tensor:
    """The gradient of ``weight``; zeros where the loss did not depend on it, which still decays."""
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad
