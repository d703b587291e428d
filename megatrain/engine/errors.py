"""What ends a run from within the engine."""


class LossScaleError(RuntimeError):
    """FP16 gradients overflow at the smallest loss scale: scaling can no longer help."""


class OperatorLockError(RuntimeError):
    """A lock says that an operator of DeepSpeed is being compiled, and nobody seems to do it."""
