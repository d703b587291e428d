"""Tokens on their way to their experts and back.

Shapes: T tokens, D width, E experts, k experts of a token, N rows: (token, expert) pairs, expert by expert.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.parallel.exchange import all_to_all

Compute = Callable[[Tensor, Tensor], Tensor]
"""(rows [N, D], rows of each expert [E]) -> [N, D]."""


class ExpertExchange:
    """Groups tokens by expert, on one rank that holds all experts. ``drops``: some tokens may not be sent."""

    def __init__(self, num_experts: int, drops: bool):
        self.num_experts, self.drops = num_experts, drops

    def __call__(self, x_TD: Tensor, experts_Tk: Tensor, gates_Tk: Tensor, compute: Compute) -> Tensor:
        """sum over a token's experts of gate x compute(token) [T, D].

        Args:
            experts_Tk: numbers of the experts; E where the token is not sent (its gate is 0 then).
        """
        tokens, choices = experts_Tk.shape
        flat = experts_Tk.flatten()
        order = flat.argsort(stable=True)
        counts = flat.bincount(minlength=self.num_experts + 1)
        if self.drops:
            order = order[: len(order) - int(counts[-1])]
        rows = x_TD[:, None].expand(-1, choices, -1).flatten(0, 1).index_select(0, order)
        results = self._run(rows, counts[:-1], compute)
        pairs = results.new_zeros(tokens * choices, results.shape[1]).index_copy(0, order, results)
        mixed = (pairs.unflatten(0, (tokens, choices)) * gates_Tk[..., None]).sum(1)
        return mixed.to(x_TD.dtype)

    def _run(self, rows_ND: Tensor, counts_E: Tensor, compute: Compute) -> Tensor:
        return compute(rows_ND, counts_E)


class ExpertParallelExchange(ExpertExchange):
    """As above, where each rank of ``group`` holds an equal run of the experts: rows travel there and back."""

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
        order = expert_N.argsort(stable=True)  # from rank by rank to expert by expert
        results = compute(arrived.index_select(0, order), received_RE.sum(0))
        return all_to_all(torch.empty_like(results).index_copy(0, order, results), self.group, received, sent)
