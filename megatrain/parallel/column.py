"""Several column-split linears of one input, which crosses the tensor ranks once for all of them.

megatron-core's linear communicates for itself alone; two of them on one input (SwiGLU's gate and up) would send the
input, and sum its gradient, twice. Shapes: S sequence (s: a rank's part of it), B micro-batch, D width.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.parallel.exchange import gather_first_dim


class _ColumnLinears(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, group: dist.ProcessGroup, split_sequence: bool, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        ctx.group, ctx.split_sequence = group, split_sequence
        whole = gather_first_dim(x, group) if split_sequence else x
        return tuple(whole @ weight.t() for weight in weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *weights = ctx.saved_tensors
        whole = gather_first_dim(x, ctx.group) if ctx.split_sequence else x
        summand = gradients[0] @ weights[0]
        for gradient, weight in zip(gradients[1:], weights[1:], strict=True):
            summand += gradient @ weight
        if ctx.split_sequence:
            of_x = torch.empty_like(x)
            work = dist.reduce_scatter_tensor(of_x, summand, group=ctx.group, async_op=True)
        else:
            of_x = summand
            work = dist.all_reduce(of_x, group=ctx.group, async_op=True)
        of_weights = [gradient.flatten(0, -2).t() @ whole.flatten(0, -2) for gradient in gradients]
        work.wait()
        return of_x, None, None, *of_weights


def column_linears(x: Tensor, weights: list[Tensor], group: dist.ProcessGroup, split_sequence: bool) -> list[Tensor]:
    """x @ weight.T for each of ``weights``, whose rows are split over ``group``.

    Args:
        x: [S, B, D] on every rank, or, with ``split_sequence``, [s, B, D] of the sequence's part (Korthikanti et al.
            2022): gathered here, and once more for the weight gradients, so that only the part is kept.
    """
    return list(_ColumnLinears.apply(x, group, split_sequence, *weights))
