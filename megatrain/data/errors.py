"""The one exception of the data room."""

from megatrain.errors import ExpectedError


class DataError(ExpectedError):
    """Data can't be read or written. The text says what is wrong, where, and what to do about it."""
