"""Rotary position embedding, Su et al. 2021, in the half-split layout of Llama, and its stretchings.

Shapes: S sequence, B micro-batch, H heads, K head width.
"""

import math

import torch
from torch import Tensor, nn

from megatrain.config.derive import head_width
from megatrain.config.schema import ModelConfig


class Rotary(nn.Module):
    """Turns each pair (i, i + K/2) of a head by position x frequency i."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config

    def forward(self, x_SBHK: Tensor, positions_SB: Tensor) -> Tensor:
        """Turns queries or keys that stand at ``positions_SB`` (B may be 1: the same in every sequence)."""
        cos, sin = self._angles(positions_SB)
        first, second = x_SBHK.float().chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return turned.to(x_SBHK.dtype)

    def _angles(self, positions_SB: Tensor) -> tuple[Tensor, Tensor]:
        """FP32 whatever the model's type: BF16 can't tell position 257 from 258."""
        frequencies = SCALINGS[self.config.rope_scaling](_frequencies(self.config, positions_SB.device), self.config)
        angles = positions_SB.float()[:, :, None, None] * frequencies  # S, B, 1, K/2
        length = _length(self.config)
        return angles.cos() * length, angles.sin() * length


def _frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """theta^(-2i/K) [K/2]; as a quotient, whose rounding long positions multiply, like most implementations."""
    width = head_width(config)
    exponents = torch.arange(0, width, 2, device=device, dtype=torch.float32) / width
    return 1.0 / config.rope_theta**exponents


def _plain(frequencies: Tensor, config: ModelConfig) -> Tensor:
    return frequencies


def _linear(frequencies: Tensor, config: ModelConfig) -> Tensor:
    """Position interpolation, Chen et al. 2023."""
    return frequencies / config.rope_scaling_factor


def _llama3(frequencies: Tensor, config: ModelConfig) -> Tensor:
    """Llama 3.1 (Grattafiori et al. 2024): stretched where few turns fit into the original length."""
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    turns = _original_length(config) / (2 * math.pi / frequencies)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / config.rope_scaling_factor + kept * frequencies


def _yarn(frequencies: Tensor, config: ModelConfig) -> Tensor:
    """YaRN, Peng et al. 2023, eq. 13 with the transition linear in the frequency's number, as published code has it."""
    width = head_width(config)

    def number(turns: float) -> float:
        """Of the frequency that makes so many turns in the original length."""
        return width * math.log(_original_length(config) / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    first = max(math.floor(number(config.rope_beta_fast)), 0)
    last = min(math.ceil(number(config.rope_beta_slow)), width - 1)
    numbers = torch.arange(width // 2, device=frequencies.device, dtype=torch.float32)
    stretched = ((numbers - first) / max(last - first, 0.001)).clamp(0, 1)
    return frequencies / config.rope_scaling_factor * stretched + frequencies * (1 - stretched)


SCALINGS = {"none": _plain, "linear": _linear, "llama3": _llama3, "yarn": _yarn}


def _original_length(config: ModelConfig) -> int:
    return config.rope_original_max_seq_len or config.max_seq_len


def _length(config: ModelConfig) -> float:
    """YaRN also lengthens queries and keys, which sharpens the softmax (ibid., eq. 15)."""
    stretched = config.rope_scaling == "yarn" and config.rope_scaling_factor > 1.0
    return 0.1 * math.log(config.rope_scaling_factor) + 1.0 if stretched else 1.0
