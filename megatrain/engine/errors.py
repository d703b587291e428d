"""What ends a run from within the engine."""

from megatrain.errors import ExpectedError


class LossScaleError(ExpectedError):
    """FP16 gradients overflow at the smallest loss scale: scaling can no longer help."""


class NonFiniteError(ExpectedError):
    """Gradients, a loss or the state hold NaN or infinity: going on would train nothing, or save what can't be used."""


class OperatorLockError(ExpectedError):
    """A lock says that an operator of DeepSpeed is being compiled, and nobody seems to do it."""


class UnknownOptimizerError(ExpectedError):
    """DeepSpeed chose a class of optimizer whose insides are not known here."""
