"""Adafactor: steps scaled by a factored second moment and by the size of the weight; no first moment.

Shazeer & Stern 2018, algorithm 4, with decoupled weight decay. Of the second moment of a matrix only the means of its
rows and columns are kept. ZeRO shows an optimizer flat pieces of its weights: each rank adds up its piece, and row and
column sums cross ranks, never matrices. So every rank has the factors of all its matrices whole: a number for each row
and column, which nobody need shard.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.optim.muon import MatrixPart

_DECAY = -0.8  # of the second moment: 1 - step^_DECAY
_CLIP = 1.0  # largest root mean square of an unscaled update
_LEAST_SCALE = 1e-3  # a weight counts as at least so large
_TINY = 1e-30


class _Piece(NamedTuple):
    """Elements from ``start`` on of the flattened parameter number ``number`` of a group, as this rank holds it.

    ``square``: the second moment of a vector; None for a matrix.
    """

    number: int
    start: int
    weight: Tensor
    gradient: Tensor
    square: Tensor | None


class Adafactor(torch.optim.Optimizer):
    """``lr`` is relative to the root mean square of a weight. State: ``step``, of vectors ``exp_avg_sq``.

    ``factors``: by a matrix' name the means [rows], [columns] of its second moment, of the whole matrix.

    Args:
        groups: with ``names`` and ``parts``, which describe the parameters in the order of their flat weights, and
            ``factored``: all of them are matrices, or none is.
        tp_group: ranks that share matrices; shard_group: ranks that share ZeRO's partitions.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        tp_group: dist.ProcessGroup | None,
        shard_group: dist.ProcessGroup | None,
    ):
        super().__init__(groups, {"lr": lr})
        self._tp_group, self._shard_group = tp_group, shard_group
        self._tp_rank = 0 if tp_group is None else dist.get_rank(tp_group)
        self._tp_size = 1 if tp_group is None else dist.get_world_size(tp_group)
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        for group in self.param_groups:
            for name, part in zip(group["names"], group["parts"], strict=True):
                if group["factored"]:
                    rows, columns = self._sides(part)
                    zeros = torch.zeros(rows + columns, device=group["params"][0].device)
                    self.factors[name] = zeros[:rows], zeros[rows:]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update. Collective over the ranks that share matrices or their flat pieces."""
        for group in self.param_groups:
            self._update(self._pieces(group), group)

    def _update(self, pieces: list[_Piece], group: dict[str, Any]) -> None:
        parts: list[MatrixPart] = group["parts"]
        device = group["params"][0].device
        sums = [torch.zeros(1 + sum(self._sides(part)), device=device) for part in parts]
        for piece in pieces:
            sums[piece.number] += self._sums_of(piece, parts[piece.number])
        sums = self._over_ranks(sums, parts)
        step = max((float(self.state[weight]["step"]) for weight in group["params"] if weight in self.state), default=1)
        if group["factored"]:
            for name, part, own in zip(group["names"], parts, sums, strict=True):
                self._move_factors(name, part, own[1:], step)
        updates = [self._direction(piece, group, step) for piece in pieces]
        squares = [torch.zeros(1, device=device) for _ in parts]
        for piece, update in zip(pieces, updates, strict=True):
            squares[piece.number] += update.square().sum()
        squares = self._over_ranks(squares, parts)
        for piece, update in zip(pieces, updates, strict=True):
            count = self._whole_size(parts[piece.number])
            size = (sums[piece.number][0] / count).sqrt().clamp_min(_LEAST_SCALE)
            clip = ((squares[piece.number][0] / count).sqrt() / _CLIP).clamp_min(1.0)
            piece.weight.mul_(1.0 - group["lr"] * group["weight_decay"])
            piece.weight.sub_(update * (group["lr"] * size / clip))

    def _pieces(self, group: dict[str, Any]) -> list[_Piece]:
        """This rank's pieces of the group's parameters; counts the step."""
        pieces, weights = [], group["params"]
        flat = len(weights) == 1 and weights[0].dim() == 1  # ZeRO's piece of all
        shard = 0 if self._shard_group is None else dist.get_rank(self._shard_group)
        begin = 0
        for number, part in enumerate(group["parts"]):
            weight = weights[0] if flat else weights[number]
            size, end = part.shape.numel(), begin + part.shape.numel()
            first = shard * weight.numel() if flat else begin  # of this rank's elements, in the flat group
            low, high = max(begin, first), min(end, first + weight.numel())
            begin = end
            if low < high and weight.grad is not None:
                square = self._state_of(weight, group).get("exp_avg_sq")
                own = slice(low - first, high - first) if flat else slice(0, size)
                value, gradient = (x.view(-1)[own] for x in (weight.data, weight.grad.to(weight.dtype)))
                square = None if square is None else square.view(-1)[own]
                pieces.append(_Piece(number, low - (end - size), value, gradient, square))
        for weight in weights:
            if weight.grad is not None:
                self._state_of(weight, group)["step"] += 1
        return pieces

    def _state_of(self, weight: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = self.state[weight]
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
            if not group["factored"]:
                state["exp_avg_sq"] = torch.zeros_like(weight, requires_grad=False)
        return state

    def _sides(self, part: MatrixPart) -> tuple[int, int]:
        """Rows and columns of the whole matrix; a vector has none that are summed."""
        if len(part.shape) != 2:
            return 0, 0
        rows, columns = (size * (self._tp_size if dim == part.split_dim else 1) for dim, size in enumerate(part.shape))
        return rows, columns

    def _whole_size(self, part: MatrixPart) -> int:
        return part.shape.numel() * (1 if part.split_dim is None else self._tp_size)

    def _places(self, piece: _Piece, part: MatrixPart) -> tuple[Tensor, Tensor]:
        """Row and column in the whole matrix of each element of a piece."""
        elements = torch.arange(piece.start, piece.start + piece.weight.numel(), device=piece.weight.device)
        rows, columns = elements // part.shape[1], elements % part.shape[1]
        offset = 0 if part.split_dim is None else self._tp_rank * part.shape[part.split_dim]
        return (rows + offset, columns) if part.split_dim == 0 else (rows, columns + offset)

    def _sums_of(self, piece: _Piece, part: MatrixPart) -> Tensor:
        """A piece's share of the squared weight, and of a matrix' rows and columns of the squared gradient."""
        sums = [piece.weight.square().sum()[None]]
        if piece.square is None:
            squares = piece.gradient.square()
            for side, place in zip(self._sides(part), self._places(piece, part), strict=True):
                sums.append(squares.new_zeros(side).index_add_(0, place, squares))
        return torch.cat(sums)

    def _over_ranks(self, sums: list[Tensor], parts: list[MatrixPart]) -> list[Tensor]:
        """Sums over all ranks that hold pieces; of what each tensor rank holds whole, the first one's count."""
        flat = torch.cat(
            [s if p.split_dim is not None or self._tp_rank == 0 else s * 0 for s, p in zip(sums, parts, strict=True)]
        )
        for group in (self._shard_group, self._tp_group):
            if group is not None and dist.get_world_size(group) > 1:
                dist.all_reduce(flat, group=group)
        return list(flat.split([len(s) for s in sums]))

    def _move_factors(self, name: str, part: MatrixPart, sums: Tensor, step: float) -> None:
        """Towards the means of the squared gradient's rows and columns, from their ``sums``."""
        rows, columns = self._sides(part)
        for factor, own, count in zip(self.factors[name], sums.split([rows, columns]), (columns, rows), strict=True):
            factor.lerp_(own / count, step**_DECAY)

    def _direction(self, piece: _Piece, group: dict[str, Any], step: float) -> Tensor:
        """Gradient over the root of the second moment."""
        square = piece.square
        if square is None:
            by_row, by_column = self.factors[group["names"][piece.number]]
            row, column = self._places(piece, group["parts"][piece.number])
            square = by_row[row] * (by_column / by_row.mean().clamp_min(_TINY))[column]
        else:
            square.lerp_(piece.gradient.square(), step**_DECAY)
        return piece.gradient * square.clamp_min(_TINY).rsqrt()
