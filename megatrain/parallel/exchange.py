"""Tensors that cross ranks inside the model, forward and backward: all-to-all and all-gather of the first dim."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, group: dist.ProcessGroup, sent: list[int] | None, received: list[int] | None
    ) -> Tensor:
        ctx.group, ctx.sent, ctx.received = group, sent, received
        return _exchange(x, group, sent, received)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _exchange(gradient, ctx.group, ctx.received, ctx.sent), None, None, None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[override]
        ctx.group = group
        return gather_first_dim(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        own = gradient.new_empty(gradient.shape[0] // dist.get_world_size(ctx.group), *gradient.shape[1:])
        dist.reduce_scatter_tensor(own, gradient.contiguous(), group=ctx.group)
        return own, None


def all_to_all(
    x: Tensor, group: dist.ProcessGroup, sent: list[int] | None = None, received: list[int] | None = None
) -> Tensor:
    """Sends each rank of ``group`` its rows of ``x``, and returns the rows that they sent, in rank order.

    ``sent``, ``received``: rows to and from each rank; without them equal parts. Gradients go back the same way.
    """
    return _AllToAll.apply(x, group, sent, received)  # type: ignore[no-any-return]


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The rows of all ranks, in rank order; the gradient of a row is the sum of what all ranks have for it."""
    return _AllGather.apply(x, group)  # type: ignore[no-any-return]


def gather_first_dim(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``all_gather`` without a gradient."""
    gathered = x.new_empty(x.shape[0] * dist.get_world_size(group), *x.shape[1:])
    dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
    return gathered


def _exchange(x: Tensor, group: dist.ProcessGroup, sent: list[int] | None, received: list[int] | None) -> Tensor:
    rows = x.shape[0] if received is None else sum(received)
    output = x.new_empty(rows, *x.shape[1:])
    dist.all_to_all_single(output, x.contiguous(), received, sent, group=group)
    return output
