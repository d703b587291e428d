"""Learning rate of a step: linear warm-up from 0, then a shape."""

import math
from typing import Any


def rate(step: int, steps: int, schedule: dict[str, Any], peak: float) -> float:
    """Of step number ``step``, the first being 1, of ``steps``."""
    warmup, low = schedule["warmup_steps"], peak * schedule["min_lr_ratio"]
    if step < warmup:
        return peak * (step / warmup)
    name = schedule["name"]
    if name == "constant":
        return peak
    if name == "inverse_sqrt":  # Vaswani et al. 2017, eq. 3, from the peak at the warm-up's end
        return max(peak * max(warmup, 1) ** 0.5 * step**-0.5, low)
    if name == "wsd":  # Hu et al. 2024: stable, then linear to the minimum at the last step
        length = schedule["decay_steps"] or math.ceil(steps / 10)
        left = (steps - step) / length
        return peak if left >= 1 else peak * left + low * (1 - left)
    end = schedule["decay_steps"] or steps
    if step >= end:
        return low
    done = (step - warmup) / (end - warmup)
    if name == "cosine":  # Loshchilov & Hutter 2017, eq. 5
        return low + (peak - low) * (1 + math.cos(math.pi * done)) / 2
    assert name == "linear"
    return peak + (low - peak) * done
