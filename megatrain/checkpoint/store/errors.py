"""The exceptions of the checkpoint room, and how an error of the operating system becomes one."""

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from megatrain.errors import STORAGE_FAILED, ExpectedError

Result = TypeVar("Result")

# What network file systems report while a server restarts or fails over; a full disk does not pass by waiting.
TRANSIENT = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO}
PAUSES = (1.0, 5.0)  # seconds before the second and the third attempt


class CheckpointError(ExpectedError):
    """A checkpoint can't be written or read. The text names tensor, file and cause."""


class UnfitError(CheckpointError):
    """A checkpoint is whole but not this run's to load: another model, other data, a newer format."""


class TransientError(CheckpointError):
    """The file system failed in a way that may pass: another attempt, with files opened anew, can succeed."""


class StorageError(CheckpointError):
    """Saves failed several times in a row, or no checkpoint can be loaded: the same start again won't help."""

    exit_code = STORAGE_FAILED


@contextmanager
def explained(action: str) -> Iterator[None]:
    """Turns an ``OSError`` of the body into ``CheckpointError("cannot <action>: <reason> (<errno name>)")``.

    The reason begins with the file that it is about, where ``action`` does not name it. ``TransientError`` where trying
    again may help.
    """
    try:
        yield
    except OSError as error:
        code = errno.errorcode.get(error.errno or 0, "no errno")
        kind = TransientError if error.errno in TRANSIENT else CheckpointError
        named = error.filename is not None and os.fsdecode(error.filename) not in action
        where = f"{os.fsdecode(error.filename)}: " if named else ""
        raise kind(f"cannot {action}: {where}{error.strerror or error} ({code})") from error


def persistently(action: Callable[[], Result]) -> Result:
    """The result of ``action``, called again after each pause while it raises ``TransientError``.

    Raises:
        TransientError: of the last attempt, which says how many there were.
    """
    for pause in PAUSES:
        try:
            return action()
        except TransientError:
            time.sleep(pause)
    try:
        return action()
    except TransientError as error:
        raise TransientError(f"{error}; tried {len(PAUSES) + 1} times") from error
