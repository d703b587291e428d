"""Rotary positions, Su et al. 2021, and their stretchings, frequency by frequency."""

import math
from typing import Any

import torch
from torch import Tensor


def turned(x_BSHK: Tensor, positions_BS: Tensor, model: dict[str, Any], length: int) -> Tensor:
    """Each pair (i, i + K/2) as a complex number, turned by position x frequency i (Llama's half-split layout)."""
    frequencies = torch.tensor(_frequencies(model, length), dtype=torch.float64)
    angles = positions_BS.double()[:, :, None, None] * frequencies
    first, second = x_BSHK.chunk(2, -1)
    result = torch.complex(first, second) * torch.polar(torch.full_like(angles, _size(model)), angles)
    return torch.cat([result.real, result.imag], -1)


def _frequencies(model: dict[str, Any], length: int) -> list[float]:
    """Of each pair, in sequences of ``length`` tokens."""
    width, theta, factor = model["attention.head_width"], model["rope.theta"], model["rope.factor"]
    original = model["rope.original_max_seq_len"] or model["max_seq_len"]
    kind = model["rope.scaling"]
    if kind == "dynamic":  # Peng et al. 2023, appendix B.1: a larger base, from the original length on
        longest = max(length, original)
        theta *= ((factor * longest / original) - (factor - 1)) ** (width / (width - 2))
    plain = [theta ** (-2 * i / width) for i in range(width // 2)]
    if kind == "linear":  # Chen et al. 2023
        return [f / factor for f in plain]
    if kind == "longrope":  # Ding et al. 2024
        by = model["rope.long_factors"] if length > original else model["rope.short_factors"]
        return [f / own for f, own in zip(plain, by, strict=True)]
    if kind == "llama3":  # Grattafiori et al. 2024: by the turns that fit into the original length
        low, high = model["rope.low_freq_factor"], model["rope.high_freq_factor"]
        kept = [_ramp((original * f / (2 * math.pi) - low) / (high - low)) for f in plain]
        return [k * f + (1 - k) * f / factor for k, f in zip(kept, plain, strict=True)]
    if kind == "yarn":  # Peng et al. 2023, section 3.2; the ends of the transition rounded as in published code
        ends = [_pair_with(model[key], original, theta, width) for key in ("rope.beta_fast", "rope.beta_slow")]
        first, last = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), width - 1)
        shares = [_ramp((i - first) / max(last - first, 0.001)) for i in range(width // 2)]
        return [s * f / factor + (1 - s) * f for s, f in zip(shares, plain, strict=True)]
    return plain


def _pair_with(turns: float, original: int, theta: float, width: int) -> float:
    """Which pair makes so many turns in the original length."""
    return width * math.log(original / (turns * 2 * math.pi), theta) / 2


def _ramp(x: float) -> float:
    return min(max(x, 0.0), 1.0)


def _size(model: dict[str, Any]) -> float:
    """What YaRN (eq. 15) and LongRoPE multiply queries and keys by."""
    factor, given = model["rope.factor"], model["rope.attention_factor"]
    original = model["rope.original_max_seq_len"] or model["max_seq_len"]
    if model["rope.scaling"] == "yarn":
        return given or 0.1 * math.log(factor) + 1
    if model["rope.scaling"] == "longrope":
        return given or math.sqrt(1 + math.log(factor) / math.log(original))
    return 1.0
