"""Context parallelism: each rank of the context axis holds a part of every sequence.

Attention alone needs the rest. The two ways to get it have the same interface as ``WholeSequence``, which
does without. Shapes: S positions of the sequence, B micro-batch, H query heads, G key/value heads, K head width.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatrain.config.schema import ParallelConfig
from megatrain.parallel.exchange import all_gather, all_to_all, gather_first_dim
from megatrain.parallel.mesh import Mesh


class WholeSequence:
    """One rank holds every position of its sequences."""

    rank, size = 0, 1

    def positions(self, num_local: int, device: torch.device | None = None) -> Tensor:
        """True positions [``num_local``], ascending, of the ones that this rank holds."""
        return torch.arange(num_local, device=device)

    def attention(self, core: nn.Module) -> nn.Module:
        """``core`` (see models/attention.py) for queries, keys and values of which this rank holds a part."""
        return core

    def head_part(self, part: int) -> int:
        """Which part of the heads ``core`` sees, where ``part`` is what is attended to here."""
        return part

    def in_order(self, x_S: Tensor) -> Tensor:
        """[S, ...] of the whole sequence in true order, without a gradient."""
        return x_S

    def total(self, x: Tensor) -> Tensor:
        """Sum over the ranks that share a sequence, without a gradient."""
        return x


class _SplitSequence(WholeSequence):
    """``size`` ranks hold equal parts of every sequence."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def total(self, x: Tensor) -> Tensor:
        x = x.detach().clone()
        dist.all_reduce(x, group=self.group)
        return x


class UlyssesContext(_SplitSequence):
    """Ranks hold runs of positions, and for attention all positions of some heads (Jacobs et al. 2023)."""

    def positions(self, num_local: int, device: torch.device | None = None) -> Tensor:
        return torch.arange(num_local, device=device) + self.rank * num_local

    def attention(self, core: nn.Module) -> nn.Module:
        return _UlyssesAttention(core, self)

    def head_part(self, part: int) -> int:
        return part * self.size + self.rank

    def in_order(self, x_S: Tensor) -> Tensor:
        return gather_first_dim(x_S, self.group)

    def to_heads(self, x_SBHK: Tensor) -> Tensor:
        """Some positions of all heads -> all positions of some heads."""
        parts = x_SBHK.unflatten(2, (self.size, -1)).permute(2, 0, 1, 3, 4)
        return all_to_all(parts, self.group).flatten(0, 1)

    def to_positions(self, x_SBHK: Tensor) -> Tensor:
        """All positions of some heads -> some positions of all heads."""
        parts = all_to_all(x_SBHK.unflatten(0, (self.size, -1)), self.group)
        return parts.permute(1, 2, 0, 3, 4).flatten(2, 3)


class _UlyssesAttention(nn.Module):
    def __init__(self, core: nn.Module, context: UlyssesContext):
        super().__init__()
        self.core, self.context = core, context

    def forward(self, query_SBHK: Tensor, key_SBGK: Tensor, value_SBGK: Tensor, *rest: Tensor | None) -> Tensor:
        # where the key/value heads do not divide, each serves several ranks
        copies = self.context.size // math.gcd(key_SBGK.shape[2], self.context.size)
        key, value = (x.repeat_interleave(copies, dim=2) for x in (key_SBGK, value_SBGK))
        query, key, value = (self.context.to_heads(x) for x in (query_SBHK, key, value))
        return self.context.to_positions(self.core(query, key, value, *rest))


class AllGatherContext(_SplitSequence):
    """Ranks gather all keys and values (Dubey et al. 2024, section 3.3.2).

    The sequence is cut into 2 x size chunks, and rank r holds chunks r and 2 x size - 1 - r: a causal mask lets
    early positions see little and late ones much, so each rank attends to the same number of pairs.
    """

    def positions(self, num_local: int, device: torch.device | None = None) -> Tensor:
        chunk = torch.arange(num_local // 2, device=device)
        return torch.cat([chunk + start * (num_local // 2) for start in self.chunks])

    @property
    def chunks(self) -> tuple[int, int]:
        """Numbers of this rank's chunks."""
        return self.rank, 2 * self.size - 1 - self.rank

    def attention(self, core: nn.Module) -> nn.Module:
        return _AllGatherAttention(core, self)

    def in_order(self, x_S: Tensor) -> Tensor:
        return self._reorder(gather_first_dim(x_S, self.group))

    def gather(self, x_S: Tensor) -> Tensor:
        """Does what ``in_order`` does, with a gradient."""
        return self._reorder(all_gather(x_S, self.group))

    def _reorder(self, gathered_S: Tensor) -> Tensor:
        """Puts chunks from the ranks' order (0, last, 1, last but one, ...) into the true one."""
        last = 2 * self.size - 1
        places = [2 * i if i < self.size else 2 * (last - i) + 1 for i in range(2 * self.size)]
        return gathered_S.unflatten(0, (2 * self.size, -1))[places].flatten(0, 1)


class _AllGatherAttention(nn.Module):
    def __init__(self, core: nn.Module, context: AllGatherContext):
        super().__init__()
        self.core, self.context = core, context

    def forward(self, query_SBHK: Tensor, key_SBGK: Tensor, value_SBGK: Tensor, *rest: Tensor | None) -> Tensor:
        key, value = self.context.gather(key_SBGK), self.context.gather(value_SBGK)
        mixed = []
        for number, query in zip(self.context.chunks, query_SBHK.chunk(2), strict=True):
            end = (number + 1) * query.shape[0]  # what comes later is masked: nobody need multiply it
            mixed.append(self.core(query, key[:end], value[:end], *rest))
        return torch.cat(mixed)


def build_context(parallel: ParallelConfig, mesh: Mesh) -> WholeSequence:
    """What the ranks of this rank's context group do with their parts of the sequences."""
    if parallel.cp == 1:
        return WholeSequence()
    return UlyssesContext(mesh.cp_group) if parallel.cp_method == "ulysses" else AllGatherContext(mesh.cp_group)
