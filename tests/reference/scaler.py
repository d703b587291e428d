"""The dynamic loss scale of FP16 (Micikevicius et al. 2018, section 3.2)."""

from typing import Any

LARGEST = 65504.0  # of FP16


class LossScaler:
    """Halves at an overflow, after ``hysteresis`` of them in a row; doubles after a run of steps without one.

    The run is a step longer than ``loss_scale_window``: DeepSpeed counts the steps between two of them.
    """

    def __init__(self, precision: dict[str, Any]):
        self.scale = precision["initial_loss_scale"] if precision["dtype"] == "fp16" else 1.0
        self._fp16, self._precision = precision["dtype"] == "fp16", precision
        self._good, self._patience = 0, precision["loss_scale_hysteresis"]

    def step(self, overflow: bool) -> None:
        if not self._fp16:
            return
        if overflow:
            self._good = 0
            if self._patience == 1:
                self.scale = max(self.scale / 2, self._precision["min_loss_scale"])
            else:
                self._patience -= 1
            return
        self._patience = self._precision["loss_scale_hysteresis"]
        self._good += 1
        if self._good > 1 and (self._good - 1) % self._precision["loss_scale_window"] == 0:
            self.scale *= 2
