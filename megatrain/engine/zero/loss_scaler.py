"""DeepSpeed's dynamic loss scaler, for FP16."""

from typing import Any

_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class LossScaler:
    """The scaler of one of DeepSpeed's optimizers, made to count a step without overflow when it is over.

    DeepSpeed 0.19.8 counts the step, and may double the loss scale, before it divides the gradients by that scale: once
    in every window a step counted half, and was clipped by half its norm.
    """

    def __init__(self, scaler: Any):
        self._scaler, self._update = scaler, scaler.update_scale
        scaler.raise_error_at_min_scale = False  # the engine tells it better

        def update_at_once(overflow: bool) -> None:
            if overflow:
                self._update(True)

        scaler.update_scale = update_at_once

    def count_good_step(self) -> None:
        """To be called after the update of a step without overflow."""
        self._update(False)

    def state(self) -> dict[str, float]:
        """The scaler's numbers, for a checkpoint."""
        return {name: float(getattr(self._scaler, name)) for name in _STATE}

    def load_state(self, state: dict[str, float]) -> None:
        """Goes on with the numbers of a checkpoint."""
        for name, value in state.items():
            current = getattr(self._scaler, name)
            setattr(self._scaler, name, type(current)(value))
