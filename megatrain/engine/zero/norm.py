"""The norm of many gradients, without copies of them."""

import torch
from torch import Tensor

_AT_ONCE = 1 << 18
"""Elements that are widened to FP64 at once on a CPU: 2 MB, which stay in its cache."""


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """Sum of the squares of all elements, added up in FP64 and rounded once to FP32; 0 of none."""
    if not tensors:
        return torch.zeros(())
    if tensors[0].device.type == "cpu":
        buffer = torch.empty(min(_AT_ONCE, max(tensor.numel() for tensor in tensors)), dtype=torch.float64)
        norms = [_norm(tensor, buffer) for tensor in tensors]
    else:  # widens in registers
        norms = list(torch._foreach_norm(tensors, 2, torch.float64))
    return torch.stack(norms).square().sum().float()


def _norm(tensor: Tensor, buffer: Tensor) -> Tensor:
    """In FP64. A CPU's norm of another type makes a copy of the whole tensor, which takes the time of five norms."""
    in_memory = sorted(
        range(tensor.dim()), key=tensor.stride().__getitem__, reverse=True
    )  # a transposed one is no copy either
    parts = [
        torch.linalg.vector_norm(buffer[: len(part)].copy_(part))
        for part in tensor.permute(in_memory).reshape(-1).split(len(buffer))
    ]
    return parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts))
