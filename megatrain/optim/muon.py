"""Muon: orthogonalised momentum for matrices, AdamW for everything else.

Jordan et al. 2024; scaled to AdamW's step size as in Liu et al. 2025, so one learning rate serves both. Matrices that
are stacked in one parameter, as queries, keys and values are, are orthogonalised one by one, as Jordan et al. advise.
ZeRO shows an optimizer flat pieces of its weights; a matrix must be whole to be orthogonalised. So the pieces of
a group are gathered over the ranks that share them, each matrix also over its tensor ranks, and every rank keeps
its own piece of the result. No layout changes the numbers.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of Jordan's quintic iteration
_ITERATIONS = 5
_RMS = 0.2  # AdamW's usual update size


class MatrixPart(NamedTuple):
    """A parameter as one rank holds it: its shape, and the dim that is split over the tensor ranks.

    ``stacked_rows``: where it is several matrices, how many rows of each stand one after the other, again and again.
    """

    shape: torch.Size
    split_dim: int | None
    stacked_rows: tuple[int, ...] = ()

    @classmethod
    def of(cls, parameter: nn.Parameter, split_dim: int | None, stacked_rows: tuple[int, ...] = ()) -> "MatrixPart":
        return cls(parameter.shape, split_dim, stacked_rows)


class Muon(torch.optim.Optimizer):
    """Groups with ``orthogonal`` hold matrices, described by ``parts`` in the order of their flat weights.

    State: ``exp_avg`` (for matrices the momentum), and ``exp_avg_sq`` and ``step`` where AdamW updates.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float,
        tp_group: dist.ProcessGroup | None,
        shard_group: dist.ProcessGroup | None,
    ):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "momentum": momentum})
        self._tp_group, self._shard_group = tp_group, shard_group

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update. Collective over the ranks that share matrices or their flat pieces."""
        for group in self.param_groups:
            if not group["orthogonal"]:
                for weight in group["params"]:
                    self._adamw(weight, group)
            elif len(group["params"]) == 1 and group["params"][0].dim() == 1:  # ZeRO's flat piece of all
                self._update_flat(group["params"][0], group)
            else:
                for weight, part in zip(group["params"], group["parts"], strict=True):
                    self._apply(weight, self._orthogonal(self._momentum(weight, group), part), group)

    def _update_flat(self, piece: Tensor, group: dict[str, Any]) -> None:
        direction = self._momentum(piece, group)
        ranks, rank = (1, 0)
        if self._shard_group is not None:
            ranks, rank = dist.get_world_size(self._shard_group), dist.get_rank(self._shard_group)
        whole = direction
        if ranks > 1:
            whole = direction.new_empty(ranks * direction.numel())
            dist.all_gather_into_tensor(whole, direction.contiguous(), group=self._shard_group)
        offset = 0
        for part in group["parts"]:
            matrix = whole[offset : offset + part.shape.numel()]
            matrix.copy_(self._orthogonal(matrix.view(part.shape), part).flatten())
            offset += part.shape.numel()
        self._apply(piece, whole.view(ranks, -1)[rank], group)

    def _momentum(self, weight: Tensor, group: dict[str, Any]) -> Tensor:
        """Nesterov's direction: the gradient as it will be after the next step of the average."""
        assert weight.grad is not None
        gradient, state = weight.grad.to(weight.dtype), self.state[weight]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(weight, requires_grad=False)
        average = state["exp_avg"].lerp_(gradient, 1.0 - group["momentum"])
        return torch.lerp(gradient, average, group["momentum"])

    def _orthogonal(self, local: Tensor, part: MatrixPart) -> Tensor:
        """This rank's part of the orthogonalised whole matrix."""
        if part.split_dim is None or self._tp_group is None:
            return orthogonalize_each(local, part.stacked_rows)
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size(self._tp_group))]
        dist.all_gather(parts, local.contiguous(), group=self._tp_group)
        whole = orthogonalize_each(torch.cat(parts, part.split_dim), part.stacked_rows)
        return whole.chunk(len(parts), part.split_dim)[dist.get_rank(self._tp_group)]

    def _apply(self, weight: Tensor, update: Tensor, group: dict[str, Any]) -> None:
        weight.mul_(1.0 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def _adamw(self, weight: Tensor, group: dict[str, Any]) -> None:
        if weight.grad is None:
            return
        (beta1, beta2), gradient, state = group["betas"], weight.grad.to(weight.dtype), self.state[weight]
        if "exp_avg" not in state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(weight, requires_grad=False) for _ in range(2))
        adamw(
            [weight],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalize_each(stacked: Tensor, stacked_rows: tuple[int, ...]) -> Tensor:
    """``orthogonalize`` of each matrix of a stack, whose rows stand as ``stacked_rows`` says; empty: it is one."""
    if not stacked_rows:
        return orthogonalize(stacked)
    matrices = stacked.unflatten(0, (-1, sum(stacked_rows))).split(stacked_rows, dim=1)
    return torch.cat([orthogonalize(m.flatten(0, 1)).view_as(m) for m in matrices], dim=1).flatten(0, 1)


def orthogonalize(matrix: Tensor) -> Tensor:
    """Nearly the orthogonal factor of ``matrix`` (singular values near 1), with AdamW's root mean square.

    Five Newton-Schulz iterations, in BF16 on GPUs.
    """
    a, b, c = _COEFFICIENTS
    x = matrix.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = (x.T if tall else x).to(matrix.dtype)
    return x * (_RMS * math.sqrt(max(matrix.shape)))
