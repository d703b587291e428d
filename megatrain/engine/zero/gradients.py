"""Where DeepSpeed's optimizers keep the gradients that have accumulated over micro-batches."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def accumulated_gradient(parameter: nn.Parameter) -> Tensor | None:
    """The summed gradient of a step so far: an FP32 buffer beside a 16-bit weight, else ``.grad``."""
    for place in ("_hp_grad", "grad_accum"):
        gradient = getattr(parameter, place, None)
        if gradient is not None:
            return gradient
    return parameter.grad


def all_reduce_accumulated(parameters: list[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Sums the accumulated gradients over ``group``, all under way at once."""
    if dist.get_world_size(group) == 1:
        return
    gradients = [g for g in map(accumulated_gradient, parameters) if g is not None]
    for work in [dist.all_reduce(gradient, group=group, async_op=True) for gradient in gradients]:
        work.wait()


def set_up_buckets(optimizer: Any) -> None:
    """Readies ZeRO's gradient buckets where no ``engine.forward`` does: before a pipeline schedule."""
    if hasattr(optimizer, "setup_buckets"):
        optimizer.setup_buckets()


def collect_gradients(optimizer: Any) -> None:
    """Adds what stands in ``.grad`` to the FP32 sums, where no hook of the backward pass does."""
    if hasattr(optimizer, "bf16_groups"):  # BF16 weights beside FP32 sums have an optimizer of their own
        for i, group in enumerate(optimizer.bf16_groups):
            for j, parameter in enumerate(group):
                optimizer.accumulate_hp_grads_and_remove_lp(parameter, i, j)
    elif optimizer.use_grad_accum_attribute:
        optimizer.fill_grad_accum_attribute()


def add_without_copies(optimizer: Any) -> None:
    """Lets 16-bit gradients be added to their FP32 sums as they are: to the same bits as an FP32 copy of each, which
    DeepSpeed makes first, at half the bytes."""
    if hasattr(optimizer, "bf16_groups"):

        @torch.no_grad()
        def update(parameter: nn.Parameter, group: int, number: int, clear_lp_grads: bool) -> None:
            if parameter.grad is not None:
                total = optimizer.fp32_groups_gradients[group][number]
                total.add_(parameter.grad.view_as(total))
                parameter._hp_grad = total  # type: ignore[attr-defined]
                optimizer.fp32_groups_has_gradients[group][number] = True

        optimizer._update_hp_grad = update
    elif getattr(optimizer, "use_grad_accum_attribute", False):
        first = optimizer._fill_param_grad_accum_attribute

        def fill(parameter: nn.Parameter) -> None:
            if parameter.grad is None or parameter.grad_accum is None:  # type: ignore[attr-defined]
                first(parameter)
            else:
                parameter.grad_accum.add_(parameter.grad)  # type: ignore[attr-defined]
                parameter.grad = None

        optimizer._fill_param_grad_accum_attribute = fill


def count_good_steps_later(loss_scaler: Any) -> Callable[[], None]:
    """Returns what is to be called after the update of a step without overflow.

    DeepSpeed 0.19.8 counts the step, and may double the loss scale, before it divides the gradients by that scale: once
    in every window a step counted half, and was clipped by half its norm.
    """
    update = loss_scaler.update_scale

    def update_at_once(overflow: bool) -> None:
        if overflow:
            update(True)

    loss_scaler.update_scale = update_at_once
    return lambda: update(False)


def align_norms(optimizer: Any) -> None:
    """Lets stages with different parameter groups agree on the gradient norm. Collective over the model's ranks.

    ZeRO 1 sums one norm for each parameter group over the ranks of a model. A stage that lacks some groups (it has no
    embedding, or no experts) would leave the others waiting: it adds zeros in their place.
    """
    if not hasattr(optimizer, "bit16_groups"):
        return
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


def add_experts_to_norm(optimizer: Any, ranks_of_one_model: Any) -> None:
    """Lets the norm of BF16 gradients under ZeRO 1 hold all experts on all ranks.

    DeepSpeed adds up the experts' part over the expert ranks alone, not over the tensor and pipeline ranks that hold
    other parts of them: each tensor rank then clips by a norm of its own. Here experts count as all weights do, over
    the ranks that hold one model, experts included; of dense weights one expert rank counts (``mark_dense_copies``).

    Args:
        ranks_of_one_model: an ``mpu`` whose model-parallel group they are.
    """
    gradients = optimizer.get_grads_for_norm

    def as_one(for_clipping: bool = False) -> Any:
        if for_clipping:
            return gradients(for_clipping=True)
        dense, experts = gradients()
        return [*dense, *(gradient for group in experts.values() for gradient in group)], {}

    optimizer.get_grads_for_norm, optimizer.mpu = as_one, ranks_of_one_model
