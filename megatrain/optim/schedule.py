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
    decay = schedule.decay_steps
    assert decay is not None, "resolve the config first"
    if schedule.name == "wsd":
        return low + (peak - low) * min(1.0, (total_steps - step) / decay)
    remaining = 1.0 - min(1.0, (step - warmup) / max(1, decay - warmup))
    if schedule.name == "cosine":
        remaining = 0.5 * (1.0 - math.cos(math.pi * remaining))
    return low + (peak - low) * remaining
