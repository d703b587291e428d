"""Learning rate as a pure function of the step."""

import math

from megatrain.config.schema import OptimizerConfig, ScheduleConfig


def learning_rate(step: int, total_steps: int, schedule: ScheduleConfig, optimizer: OptimizerConfig) -> float:
    """Rate of optimizer step ``step`` (the first is 1) of ``total_steps``.

    Linear warm-up to the peak at ``warmup_steps``, then by name: ``cosine`` (Loshchilov & Hutter 2017)
    and ``linear`` reach the minimum at ``decay_steps``; ``inverse_sqrt`` (Vaswani et al. 2017, eq. 3)
    falls with sqrt(warmup_steps / step); ``wsd`` (Hu et al. 2024) stays at the peak and falls over the last
    ``decay_steps``, linearly (Hägele et al. 2024).
    """
    peak, low = optimizer.lr, optimizer.lr * schedule.min_lr_ratio
    warmup = schedule.warmup_steps
    if step < warmup:
        return peak * step / warmup
    if schedule.name == "constant":
        return peak
    if schedule.name == "inverse_sqrt":
        return max(low, peak * math.sqrt(max(warmup, 1) / max(step, 1)))
    if schedule.name == "wsd":
        length = schedule.decay_steps or math.ceil(total_steps / 10)
        return low + (peak - low) * _clamp((total_steps - step) / length)
    remaining = 1.0 - _clamp((step - warmup) / max(1, (schedule.decay_steps or total_steps) - warmup))
    if schedule.name == "cosine":
        remaining = 0.5 * (1.0 - math.cos(math.pi * remaining))
    return low + (peak - low) * remaining


def _clamp(share: float) -> float:
    return min(1.0, max(0.0, share))
