"""What ends a run from within a step."""


class LossScaleError(RuntimeError):
    """FP16 gradients overflow at the smallest loss scale: scaling can no longer help."""
