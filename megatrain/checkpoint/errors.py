"""The exceptions of the checkpoint room, and how an error of the operating system becomes one."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class CheckpointError(Exception):
    """A checkpoint can't be written or read. The text names tensor, file and cause."""


class UnfitError(CheckpointError):
    """A checkpoint is whole but not this run's to load: another model, other data, a newer format."""


@contextmanager
def explained(action: str) -> Iterator[None]:
    """Turns an ``OSError`` of the body into ``CheckpointError("cannot <action>: <reason> (<errno name>)")``."""
    try:
        yield
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, "no errno")
        raise CheckpointError(f"cannot {action}: {error.strerror or error} ({code})") from error
