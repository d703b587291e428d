"""ZeRO 1 over FP32 weights (Rajbhandari et al. 2020, section 5): each rank updates a shard of them in place."""

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatrain.engine.zero.fragments import Fragment, OwnFragment
from megatrain.engine.zero.runtime import Moments
from megatrain.engine.zero.whole import Pieces, WholeRuntime, gradient_of
from megatrain.parallel.marks import marks_of
from megatrain.parallel.mesh import Mesh
from megatrain.spec.kinds import WEIGHT

_ALIGNMENT = 2  # of a shard, in elements, as DeepSpeed has it


class _Flat:
    """The weights of a parameter group one after the other in one buffer, of which each rank of ``ranks`` has a shard.

    The parameters become views of the buffer, and so does the ``shard`` that the optimizer updates.
    """

    def __init__(self, parameters: list[nn.Parameter], ranks: dist.ProcessGroup):
        self.parameters, self.ranks = parameters, ranks
        self.num_ranks, self.rank = dist.get_world_size(ranks), dist.get_rank(ranks)
        self.numel = sum(parameter.numel() for parameter in parameters)
        unit = _ALIGNMENT * self.num_ranks
        self.size = -(-self.numel // unit) * _ALIGNMENT
        self.buffer = torch.zeros(self.size * self.num_ranks, device=parameters[0].device)
        self.begins: dict[nn.Parameter, int] = {}
        begin = 0
        for parameter in parameters:
            view = self.buffer[begin : begin + parameter.numel()].view(parameter.shape)
            view.copy_(parameter.detach())
            parameter.data, self.begins[parameter] = view, begin
            begin += parameter.numel()
        self.shard = nn.Parameter(self.buffer[self.rank * self.size :][: self.size])

    def real(self, rank: int) -> int:
        """Elements of a rank's shard without what pads it."""
        return max(0, min(self.size, self.numel - rank * self.size))

    def part(self, parameter: nn.Parameter, rank: int) -> tuple[int, int, int]:
        """Of the part of ``parameter`` in a rank's shard: start in the parameter, start in the shard, size."""
        begin = self.begins[parameter]
        low = max(begin, rank * self.size)
        high = min(begin + parameter.numel(), (rank + 1) * self.size)
        return low - begin, low - rank * self.size, max(0, high - low)


class ShardedRuntime(WholeRuntime):
    """Gradients are averaged to the rank that updates them, weights are gathered; both in a message for each rank."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, moments: Moments, clip_norm: float, mesh: Mesh
    ):
        super().__init__(model, optimizer, moments, clip_norm, mesh)
        self._norm_groups = [mesh.data_group, mesh.model_group]
        self._messages: dict[tuple[dist.ProcessGroup, int], Tensor] = {}
        self._flats: list[_Flat] = []
        for group in optimizer.param_groups:
            experts = marks_of(group["params"][0]).expert_group is not None
            flat = _Flat(group["params"], mesh.edp_group if experts else mesh.data_group)
            group["params"] = [flat.shard]
            self._flats.append(flat)
        self._flat_of = {parameter: flat for flat in self._flats for parameter in flat.parameters}

    def _reduce(self) -> list[Pieces]:
        by_ranks: defaultdict[dist.ProcessGroup, list[_Flat]] = defaultdict(list)
        for flat in self._flats:
            by_ranks[flat.ranks].append(flat)
        for ranks, flats in by_ranks.items():
            self._reduce_to_shards(ranks, flats)
        return [self._pieces(flat) for flat in self._flats]

    def _reduce_to_shards(self, ranks: dist.ProcessGroup, flats: list[_Flat]) -> None:
        """Averages the gradients to the ranks that update them: for each rank one message with all its shards."""
        work = []
        for number, receiver in enumerate(dist.get_process_group_ranks(ranks)):
            message = self._message(ranks, number, sum(flat.real(number) for flat in flats))
            parts = message.split([flat.real(number) for flat in flats])
            for flat, part in zip(flats, parts, strict=True):
                self._fill(part, flat, number)
            work.append(dist.reduce(message, receiver, group=ranks, async_op=True))
            if number == dist.get_rank(ranks):
                own = parts
        for reduction in work:
            reduction.wait()
        for flat, part in zip(flats, own, strict=True):
            padding = flat.size - len(part)
            flat.shard.grad = nn.functional.pad(part, (0, padding)) if padding else part

    def _message(self, ranks: dist.ProcessGroup, number: int, size: int) -> Tensor:
        """A buffer to send. A host's pages take longer to get than to fill, so there it is kept."""
        if self._mesh.device.type != "cpu":
            return torch.empty(size, device=self._mesh.device)
        if (ranks, number) not in self._messages:
            self._messages[ranks, number] = torch.empty(size)
        return self._messages[ranks, number]

    def _fill(self, part: Tensor, flat: _Flat, rank: int) -> None:
        for parameter in flat.parameters:
            start, at, size = flat.part(parameter, rank)
            if size:
                gradient = gradient_of(parameter).reshape(-1)[start : start + size]
                torch.div(gradient, float(self._mesh.topology.data_size), out=part[at : at + size])

    def _pieces(self, flat: _Flat) -> Pieces:
        pieces, gradient = [], gradient_of(flat.shard)
        for parameter in flat.parameters:
            _, at, size = flat.part(parameter, flat.rank)
            if size:
                pieces.append((gradient[at : at + size], parameter))
        return pieces

    def finish_import(self) -> None:
        for flat in self._flats:
            if flat.num_ranks > 1:
                dist.all_gather_into_tensor(flat.buffer, flat.shard.detach(), group=flat.ranks)

    def fragment(self, name: str, parameter: nn.Parameter) -> Fragment | None:
        flat = self._flat_of[parameter]
        start, at, size = flat.part(parameter, flat.rank)
        state: dict[str, Any] = self.base_optimizer.state.get(flat.shard, {})
        return OwnFragment(name, parameter, start, size, flat.shard, state, at) if size else None

    def whole(self, parameter: nn.Parameter, kind: str) -> Tensor:
        flat = self._flat_of[parameter]
        held = flat.shard.detach() if kind == WEIGHT else self.base_optimizer.state[flat.shard][kind]
        start, at, size = flat.part(parameter, flat.rank)
        total = torch.zeros(parameter.numel(), device=held.device)
        total[start : start + size] = held[at : at + size]
        dist.all_reduce(total, group=flat.ranks)
        return total.view(parameter.shape)
