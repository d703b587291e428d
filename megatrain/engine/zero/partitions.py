"""DeepSpeed's optimizers that keep FP32 weights and moments in flat partitions: for ZeRO 1 and 2, and for BF16."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatrain.engine.zero.deepspeed_runtime import DeepSpeedRuntime
from megatrain.engine.zero.fragments import Fragment, PartitionFragment
from megatrain.engine.zero.norm import sum_of_squares
from megatrain.engine.zero.runtime import Moments
from megatrain.parallel.marks import marks_of
from megatrain.parallel.mesh import Mesh


class PartitionRuntime(DeepSpeedRuntime):
    """A parameter knows its place in the flat partitions (``_hp_mapping``)."""

    def fragment(self, name: str, parameter: nn.Parameter) -> Fragment | None:
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        place = mapping.lp_fragment_address
        return PartitionFragment(name, parameter, place.start, place.numel)

    def link_moments(self) -> None:
        if self.moments_exist():  # DeepSpeed looked before there were any
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def finish_import(self) -> None:
        self.optimizer.update_lp_params()


class Stage1And2Runtime(PartitionRuntime):
    """``DeepSpeedZeroOptimizer``: ZeRO 1 and 2, where BF16 weights do not have FP32 sums under ZeRO 1."""

    def __init__(self, deepspeed: Any, mesh: Mesh, moments: Moments):
        super().__init__(deepspeed, mesh, moments)
        if self.optimizer.use_grad_accum_attribute:
            self._add_without_copies()
        self._clip = self.optimizer.unscale_and_clip_grads
        self.optimizer.unscale_and_clip_grads = self._clip_what_is_too_large
        self.optimizer.get_grad_norm_direct = self._norm_without_copies
        if mesh.topology.pp > 1:
            self._align_norms()

    def begin_schedule(self) -> None:
        self.optimizer.setup_buckets()  # else ``forward`` does

    def collect_gradients(self) -> None:
        if self.optimizer.use_grad_accum_attribute:
            self.optimizer.fill_grad_accum_attribute()

    def accumulated_gradient(self, parameter: nn.Parameter) -> Tensor | None:
        total = parameter.grad_accum  # type: ignore[attr-defined]  # an FP32 sum beside a 16-bit weight
        return parameter.grad if total is None else total

    def _add_without_copies(self) -> None:
        """Lets 16-bit gradients be added to their FP32 sums as they are: to the same bits as an FP32 copy of each,
        which DeepSpeed makes first, at half the bytes."""
        first = self.optimizer._fill_param_grad_accum_attribute

        def fill(parameter: nn.Parameter) -> None:
            if parameter.grad is None or parameter.grad_accum is None:  # type: ignore[attr-defined]
                first(parameter)
            else:
                parameter.grad_accum.add_(parameter.grad)  # type: ignore[attr-defined]
                parameter.grad = None

        self.optimizer._fill_param_grad_accum_attribute = fill

    def _norm_without_copies(self, gradients: Iterable[Tensor], params: Iterable[Any], norm_type: int = 2) -> Tensor:
        """In the place of DeepSpeed's norm of a parameter group, which makes an FP64 copy of each gradient. Collective.

        Returns: -1 where it is not finite, as DeepSpeed wants it.
        """
        first, own = self.mesh.coordinate("tp") == 0, []
        weights = (gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False))
        for gradient, parameter in zip(weights, params, strict=False):  # padding may follow
            marks = marks_of(parameter)
            if not marks.counted_elsewhere and (marks.tensor_dim is not None or first):
                own.append(gradient.detach())
        square = sum_of_squares(own).to(self.mesh.device)
        for group in (self.optimizer.dp_process_group, self.optimizer.model_parallel_group):
            if dist.get_world_size(group) > 1:
                dist.all_reduce(square, group=group)
        return torch.where(square.isfinite(), square.sqrt(), -1.0)

    def _clip_what_is_too_large(self, gradients: list[Tensor], norm: Tensor) -> None:
        """DeepSpeed's, but where it would multiply by 1."""
        scale, most = self.optimizer.loss_scale, self.optimizer.clip_grad
        if scale != 1.0 or (most > 0 and (norm + 1e-6) / most > 1.0):
            self._clip(gradients, norm)

    def _align_norms(self) -> None:
        """Lets stages with different parameter groups agree on the gradient norm. Collective over the model's ranks.

        ZeRO 1 sums one norm for each parameter group over the ranks of a model. A stage that lacks some groups (it has
        no embedding, or no experts) would leave the others waiting: it adds zeros in their place.
        """
        optimizer = self.optimizer
        own = len(optimizer.bit16_groups)
        most = torch.tensor(own, device=optimizer.device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=optimizer.model_parallel_group)
        num_missing, norm_of_own = int(most) - own, optimizer.scaled_global_norm
        if num_missing == 0:
            return

        def scaled_global_norm(norm_type: int = 2) -> Tensor:
            squares = [norm_of_own(norm_type).square()]
            for _ in range(num_missing):
                squares.append(torch.zeros_like(squares[0]))
                dist.all_reduce(squares[-1], group=optimizer.model_parallel_group)
            total = torch.stack(squares).sum().sqrt()
            return torch.where(total.isfinite(), total, torch.inf)

        optimizer.scaled_global_norm = scaled_global_norm


class BF16Runtime(PartitionRuntime):
    """``BF16_Optimizer``: BF16 weights with FP32 sums of their gradients, under ZeRO 0 and 1."""

    def __init__(self, deepspeed: Any, mesh: Mesh, moments: Moments):
        super().__init__(deepspeed, mesh, moments)
        self._add_without_copies()

    def collect_gradients(self) -> None:
        for i, group in enumerate(self.optimizer.bf16_groups):
            for j, parameter in enumerate(group):
                self.optimizer.accumulate_hp_grads_and_remove_lp(parameter, i, j)

    def accumulated_gradient(self, parameter: nn.Parameter) -> Tensor | None:
        return getattr(parameter, "_hp_grad", None)  # there is none before the first gradient

    def _add_without_copies(self) -> None:
        self.optimizer._update_hp_grad = self._add_to_sum

    @torch.no_grad()
    def _add_to_sum(self, parameter: nn.Parameter, group: int, number: int, clear_lp_grads: bool) -> None:
        """In the place of DeepSpeed's, which makes an FP32 copy of each gradient first, to the same bits."""
        if parameter.grad is not None:
            total = self.optimizer.fp32_groups_gradients[group][number]
            total.add_(parameter.grad.view_as(total))
            parameter._hp_grad = total  # type: ignore[attr-defined]
            self.optimizer.fp32_groups_has_gradients[group][number] = True

    def add_experts_to_norm(self, ranks_of_one_model: Any) -> None:
        """Lets the norm of BF16 gradients under ZeRO 1 hold all experts on all ranks.

        DeepSpeed adds up the experts' part over the expert ranks alone, not over the tensor and pipeline ranks that
        hold other parts of them: each tensor rank then clips by a norm of its own. Here experts count as all weights
        do, over the ranks that hold one model, experts included; of dense weights one expert rank counts
        (``mark_dense_copies``).

        Args:
            ranks_of_one_model: an ``mpu`` whose model-parallel group they are.
        """
        gradients = self.optimizer.get_grads_for_norm

        def as_one(for_clipping: bool = False) -> Any:
            if for_clipping:
                return gradients(for_clipping=True)
            dense, experts = gradients()
            return [*dense, *(gradient for group in experts.values() for gradient in group)], {}

        self.optimizer.get_grads_for_norm, self.optimizer.mpu = as_one, ranks_of_one_model
