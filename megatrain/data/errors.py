"""The one exception of the data room."""


class DataError(Exception):
    """Data can't be read or written. The text says what is wrong, where, and what to do about it."""
