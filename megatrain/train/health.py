"""Whether the numbers of a run are finite, and what becomes of it where they are not."""

import math
from pathlib import Path

from megatrain.config.schema import ResolvedRun
from megatrain.engine.engine import Engine, RankBatch, StepResult
from megatrain.engine.errors import NonFiniteError
from megatrain.engine.non_finite import bad_gradient, bad_state


class Health:
    """Counts the steps in a row whose gradients are not finite (the engine skips them) and watches what is saved.

    Knows of a step what the host knows anyway; losses and norms stay on the device until one is asked for.
    """

    def __init__(self, config: ResolvedRun, engine: Engine):
        self.config, self.engine = config, engine
        self.in_a_row = 0
        self._latest: StepResult | None = None
        self._good: tuple[int, StepResult] | None = None
        self._skipped: RankBatch | None = None

    def add(self, step: int, batch: RankBatch, result: StepResult) -> None:
        """A step that was made or skipped."""
        self._latest, self._skipped = result, batch if result.skipped else None
        self.in_a_row = self.in_a_row + 1 if result.skipped else 0
        if not result.skipped:
            self._good = step, result

    @property
    def is_at_its_end(self) -> bool:
        """Whether as many steps in a row were skipped as the config lets pass."""
        return self.in_a_row >= self.config.train.max_skipped_steps

    def error(self, step: int, newest: Path | None) -> NonFiniteError:
        """What ends the run after ``step``, which was skipped, or whose state is not to be saved. Collective.

        The batch of a skipped step is computed once more, to find the culprit.
        """
        if self._skipped is None:
            return NonFiniteError(
                f"step {step}, the last one, was not saved: {self.problem_of_saving(step)}, in "
                f"{self.config.precision.dtype}. {self._history(newest)}"
            )
        found = bad_gradient(self.engine, self._skipped)
        where = (
            f"the first one in the backward pass is of {found.name}, on rank {found.rank}"
            if found is not None
            else "computed once more, each of them is finite: their norm overflows, or the device erred"
        )
        count = f", in {self.in_a_row} steps in a row" if self.in_a_row > 1 else ""
        return NonFiniteError(
            f"step {step}: gradients are not finite in {self.config.precision.dtype}{count}; {where}. "
            f"{self._history(newest)}"
        )

    def problem_of_saving(self, step: int) -> str | None:
        """Why the state after ``step`` should not be saved; None: it may. Waits for the device. Collective."""
        if self.in_a_row and self.config.precision.dtype != "fp16":  # where an overflow only means another loss scale
            return f"the gradients of step {step} are not finite"
        if self._latest is not None and not math.isfinite(float(self._latest.loss)):
            return f"the loss of step {step} is {float(self._latest.loss)}"
        if (found := bad_state(self.engine)) is not None:
            return f"{found.kind} of {found.name} is not finite, on rank {found.rank}"
        return None

    def _history(self, newest: Path | None) -> str:
        good = "No step of this start had finite gradients"
        if self._good is not None:
            step, result = self._good
            good = (
                f"The last step with finite gradients was {step}: loss {float(result.loss):.4f}, gradient norm "
                f"{float(result.grad_norm):.3f}"
            )
        back = f"A new start goes on from {newest}" if newest is not None else "There is no checkpoint to go back to"
        return f"{good}. {back}; lower optimizer.lr, look at the data, or set train.max_skipped_steps to more"
