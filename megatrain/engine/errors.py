"""What ends a run from within the engine."""


class LossScaleError(RuntimeError):
    """FP16 gradients overflow at the smallest loss scale: scaling can no longer help."""


class NonFiniteError(RuntimeError):
    """Gradients, a loss or the state hold NaN or infinity: going on would train nothing, or save what can't be used."""


class OperatorLockError(RuntimeError):
    """A lock says that an operator of DeepSpeed is being compiled, and nobody seems to do it."""


class LauncherError(RuntimeError):
    """The launcher's variables in the environment don't say where this rank is, or the ranks can't meet there."""
