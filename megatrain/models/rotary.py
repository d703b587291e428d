"""Rotary position embedding, Su et al. 2021, in the half-split layout of Llama.

Shapes: S sequence, B micro-batch, H heads, K head width.
"""

import torch
from torch import Tensor, nn


class Rotary(nn.Module):
    """Turns each pair (i, i + K/2) of a head by position x theta^(-2i/K)."""

    def __init__(self, head_width: int, theta: float):
        super().__init__()
        self.head_width, self.theta = head_width, theta

    def forward(self, x_SBHK: Tensor) -> Tensor:
        cos, sin = self._angles(x_SBHK.shape[0], x_SBHK.device)
        first, second = x_SBHK.float().chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return turned.to(x_SBHK.dtype)

    def _angles(self, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """FP32 whatever the model's type: BF16 can't tell position 257 from 258."""
        exponents = torch.arange(0, self.head_width, 2, device=device, dtype=torch.float32) / self.head_width
        angles = torch.outer(torch.arange(seq_len, device=device, dtype=torch.float32), self.theta**-exponents)
        angles = angles[:, None, None, :]  # S, 1, 1, K/2
        return angles.cos(), angles.sin()
