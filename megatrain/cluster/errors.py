"""The exception of what the launcher says."""

from megatrain.errors import ExpectedError


class LauncherError(ExpectedError):
    """The launcher's variables in the environment don't say where this rank is, or the ranks can't meet there."""
