"""Rotary position embedding, Su et al. 2021, in the half-split layout of Llama, and its stretchings.

Shapes: S sequence, B micro-batch, H heads, K head width.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megatrain.spec.schema import ModelSpec


class Turns(NamedTuple):
    """Cosines and sines [S, B, 1, K/2] of the angles; B may be 1: the same in every sequence."""

    cos: Tensor
    sin: Tensor


def turn(x_SBHK: Tensor, turns: Turns) -> Tensor:
    """Turns each pair (i, i + K/2) of queries or keys, in FP32."""
    first, second = x_SBHK.float().chunk(2, dim=-1)
    cos, sin = turns
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x_SBHK.dtype)


class Rotary(nn.Module):
    """The angles of all pairs: position x frequency i. Made once for all blocks."""

    def __init__(self, config: ModelSpec):
        super().__init__()
        self.config = config

    def forward(self, positions_SB: Tensor, length: int) -> Turns:
        """Turns of what stands at ``positions_SB``; some stretchings depend on the ``length`` of the whole sequences.

        FP32 whatever the model's type: BF16 can't tell position 257 from 258.
        """
        frequencies = SCALINGS[self.config.rope.scaling](self.config, length, positions_SB.device)
        angles = positions_SB.float()[:, :, None, None] * frequencies  # S, B, 1, K/2
        size = _size(self.config)
        return Turns(angles.cos() * size, angles.sin() * size)


def _powers(theta: float, config: ModelSpec, device: torch.device) -> Tensor:
    """theta^(2i/K) [K/2]."""
    width = config.attention.head_width
    return theta ** (torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)


def _plain(config: ModelSpec, length: int, device: torch.device) -> Tensor:
    """theta^(-2i/K) [K/2]; as a quotient, whose rounding long positions multiply, like most implementations."""
    return 1.0 / _powers(config.rope.theta, config, device)


def _linear(config: ModelSpec, length: int, device: torch.device) -> Tensor:
    """Position interpolation, Chen et al. 2023."""
    return _plain(config, length, device) / config.rope.factor


def _dynamic(config: ModelSpec, length: int, device: torch.device) -> Tensor:
    """NTK-aware stretching that grows with the sequence (Peng et al. 2023, appendix B.1 and section 3.3, as published
    code has it): a larger theta, from the original length on."""
    factor, original, width = config.rope.factor, config.rope.original_max_seq_len, config.attention.head_width
    stretch = factor * max(length, original) / original - (factor - 1)
    return 1.0 / _powers(config.rope.theta * stretch ** (width / (width - 2)), config, device)


def _longrope(config: ModelSpec, length: int, device: torch.device) -> Tensor:
    """LongRoPE, Ding et al. 2024: each frequency has a stretch of its own, and others in sequences over the original
    length."""
    stretches = config.rope.long_factors if length > config.rope.original_max_seq_len else config.rope.short_factors
    return 1.0 / (torch.tensor(stretches, device=device) * _powers(config.rope.theta, config, device))


def _llama3(config: ModelSpec, length: int, device: torch.device) -> Tensor:
    """Llama 3.1 (Grattafiori et al. 2024): stretched where few turns fit into the original length."""
    frequencies = _plain(config, length, device)
    low, high = config.rope.low_freq_factor, config.rope.high_freq_factor
    turns = config.rope.original_max_seq_len / (2 * math.pi / frequencies)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / config.rope.factor + kept * frequencies


def _yarn(config: ModelSpec, length: int, device: torch.device) -> Tensor:
    """YaRN, Peng et al. 2023, eq. 13 with the transition linear in the frequency's number, as published code has it."""
    frequencies = _plain(config, length, device)
    width = config.attention.head_width

    def number(turns: float) -> float:
        """Of the frequency that makes so many turns in the original length."""
        return (
            width
            * math.log(config.rope.original_max_seq_len / (turns * 2 * math.pi))
            / (2 * math.log(config.rope.theta))
        )

    first = max(math.floor(number(config.rope.beta_fast)), 0)
    last = min(math.ceil(number(config.rope.beta_slow)), width - 1)
    numbers = torch.arange(width // 2, device=frequencies.device, dtype=torch.float32)
    stretched = ((numbers - first) / max(last - first, 0.001)).clamp(0, 1)
    return frequencies / config.rope.factor * stretched + frequencies * (1 - stretched)


SCALINGS = {
    "none": _plain,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Those that have other frequencies in sequences longer than the original length."""


def _size(config: ModelSpec) -> float:
    """Some also lengthen queries and keys, which sharpens the softmax: YaRN (ibid., eq. 15) and LongRoPE (ibid.)."""
    factor, given = config.rope.factor, config.rope.attention_factor
    if config.rope.scaling == "yarn":
        return 0.1 * math.log(factor) + 1.0 if given is None else given
    if config.rope.scaling == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(config.rope.original_max_seq_len)) if given is None else given
    return 1.0
