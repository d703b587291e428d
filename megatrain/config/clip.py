"""A schedule longer than the run: cut to fit, so that any config can be tried for a few steps."""

from megatrain.config.derive import decay_steps
from megatrain.config.schema import RunConfig


def clipped(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """``config`` with a warm-up, and of wsd a decay, that fit into ``train.steps``; and a note for each that did not.

    The warm-up goes first: what is left is the decay's. wsd keeps a step for it at least.
    """
    schedule, steps = config.schedule, config.train.steps
    has_decay = schedule.name == "wsd"
    warmup = min(schedule.warmup_steps, steps - 1 if has_decay else steps)
    changed: dict[str, int] = {} if warmup == schedule.warmup_steps else {"warmup_steps": warmup}
    decay = decay_steps(config)
    if has_decay and decay is not None and warmup + decay > steps:
        changed["decay_steps"] = steps - warmup
    wanted = {"warmup_steps": schedule.warmup_steps, "decay_steps": decay}
    notes = [
        f"schedule.{name}: {wanted[name]} steps do not fit into train.steps = {steps}; cut to {value}"
        for name, value in changed.items()
    ]
    return config.model_copy(update={"schedule": schedule.model_copy(update=changed)}), notes
