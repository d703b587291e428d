"""Tokens on their way to their experts and back.

Rows are gathered both ways, forward and backward: no two rows are ever added into one place, which on GPUs would be
slow and in an order of its own every time. Shapes: T tokens, D width, E experts, k experts of a token, N rows:
(token, expert) pairs, expert by expert.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatrain.parallel.exchange import all_to_all

Compute = Callable[[Tensor, Tensor], Tensor]
"""(rows [N, D], rows of each expert [E]) -> [N, D]."""


def sum_rows(rows_ND: Tensor, rows_Tk: Tensor, drops: bool) -> Tensor:
    """sum over k of the rows of a token [T, D], added in FP32; number N stands for none where ``drops``."""
    ones_Tk = rows_ND.new_ones((), dtype=torch.promote_types(rows_ND.dtype, torch.float32)).expand_as(rows_Tk)
    return mix_rows(rows_ND, ones_Tk, rows_Tk, drops)


def mix_rows(rows_ND: Tensor, gates_Tk: Tensor, rows_Tk: Tensor, drops: bool) -> Tensor:
    """sum over k of gate x row of a token [T, D], slot by slot: a tensor of all pairs would be k times as large."""
    rows_ND = _closed(rows_ND, drops)
    slots = zip(rows_Tk.unbind(1), gates_Tk.unbind(1), strict=True)
    mixed_TD = functools.reduce(torch.add, (rows_ND[rows_T] * gates_T[:, None] for rows_T, gates_T in slots))
    return mixed_TD.to(rows_ND.dtype)


def mix_rows_backward(
    dy_TD: Tensor, rows_ND: Tensor, gates_Tk: Tensor, rows_Tk: Tensor, choices_N: Tensor, drops: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows and the gates; row n is the choice ``choices_N`` = token x k + slot."""
    drows_ND = dy_TD[choices_N // rows_Tk.shape[1]] * gates_Tk.flatten()[choices_N][:, None]
    dgates_Tk = (_closed(rows_ND, drops)[rows_Tk] * dy_TD[:, None].to(gates_Tk.dtype)).sum(-1)
    return drows_ND.to(rows_ND.dtype), dgates_Tk


def _closed(rows_ND: Tensor, drops: bool) -> Tensor:
    return F.pad(rows_ND, (0, 0, 0, 1)) if drops else rows_ND


class ExpertExchange:
    """Groups tokens by expert, on one rank that holds all experts. ``drops``: some tokens may not be sent."""

    def __init__(self, num_experts: int, drops: bool):
        self.num_experts, self.drops = num_experts, drops
        self.sum, self.mix, self.mix_backward = sum_rows, mix_rows, mix_rows_backward

    def compile(self) -> None:
        """Lets torch.compile fuse the gathers with what is done to the rows."""
        self.sum, self.mix = torch.compile(sum_rows), torch.compile(mix_rows)
        self.mix_backward = torch.compile(mix_rows_backward)

    def __call__(self, x_TD: Tensor, experts_Tk: Tensor, gates_Tk: Tensor, compute: Compute) -> Tensor:
        """sum over a token's experts of gate x compute(token) [T, D].

        Args:
            experts_Tk: numbers of the experts; E where the token is not sent (its gate is 0 then).
        """
        experts_N, choices_N = experts_Tk.flatten().to(torch.int16).sort(stable=True)  # few bits sort in few passes
        numbers_E = torch.arange(self.num_experts, dtype=torch.int16, device=choices_N.device)
        ends_E = torch.searchsorted(experts_N, numbers_E, right=True)
        rows_Tk = _inverse(choices_N).view_as(experts_Tk)
        if self.drops:
            sent = int(ends_E[-1])
            choices_N, rows_Tk = choices_N[:sent], rows_Tk.clamp(max=sent)
        rows = _Gathered.apply(x_TD, choices_N // experts_Tk.shape[1], rows_Tk, self, self.drops)
        results = self._run(rows, ends_E.diff(prepend=ends_E.new_zeros(1)), compute)
        return _Mixed.apply(results, gates_Tk, rows_Tk, choices_N, self)  # type: ignore[no-any-return]

    def _run(self, rows_ND: Tensor, counts_E: Tensor, compute: Compute) -> Tensor:
        return compute(rows_ND, counts_E)


class ExpertParallelExchange(ExpertExchange):
    """The exchange where each rank of ``group`` holds an equal run of the experts: rows travel there and back."""

    def __init__(self, num_experts: int, drops: bool, group: dist.ProcessGroup):
        super().__init__(num_experts, drops)
        self.group, self.size = group, dist.get_world_size(group)

    def _run(self, rows_ND: Tensor, counts_E: Tensor, compute: Compute) -> Tensor:
        sent_RE = counts_E.unflatten(0, (self.size, -1))  # R ranks, E experts of each
        received_RE = all_to_all(sent_RE, self.group)
        sent, received = sent_RE.sum(1).tolist(), received_RE.sum(1).tolist()
        arrived = all_to_all(rows_ND, self.group, sent, received)
        own = torch.arange(received_RE.shape[1], device=rows_ND.device)
        expert_N = own.repeat(self.size).repeat_interleave(received_RE.flatten())
        by_expert = expert_N.argsort(stable=True)  # from rank by rank to expert by expert
        by_rank = _inverse(by_expert)
        results = compute(self._reordered(arrived, by_expert, by_rank), received_RE.sum(0))
        return all_to_all(self._reordered(results, by_rank, by_expert), self.group, received, sent)

    def _reordered(self, rows_ND: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        return _Gathered.apply(rows_ND, order_N, inverse_N[:, None], self, False)  # type: ignore[no-any-return]


class _Gathered(torch.autograd.Function):
    """x[index]; ``rows_Tk``: where each row of x went."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x_TD: Tensor, index_N: Tensor, rows_Tk: Tensor, exchange: ExpertExchange, drops: bool
    ) -> Tensor:
        ctx.save_for_backward(rows_Tk)
        ctx.exchange, ctx.drops = exchange, drops
        return x_TD.index_select(0, index_N)

    @staticmethod
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return ctx.exchange.sum(gradient_ND, *ctx.saved_tensors, ctx.drops), None, None, None, None


class _Mixed(torch.autograd.Function):
    """``mix_rows``, whose gradient is gathered too."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, rows_ND: Tensor, gates_Tk: Tensor, rows_Tk: Tensor, choices_N: Tensor, exchange: ExpertExchange
    ) -> Tensor:
        ctx.save_for_backward(rows_ND, gates_Tk, rows_Tk, choices_N)
        ctx.exchange = exchange
        return exchange.mix(rows_ND, gates_Tk, rows_Tk, exchange.drops)

    @staticmethod
    def backward(ctx: Any, gradient_TD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        drows, dgates = ctx.exchange.mix_backward(gradient_TD, *ctx.saved_tensors, ctx.exchange.drops)
        return drows, dgates, None, None, None


def _inverse(order_N: Tensor) -> Tensor:
    """Where each place of a permutation went."""
    places = torch.arange(len(order_N), device=order_N.device)
    return torch.empty_like(order_N).index_copy_(0, order_N, places)
