"""Writes that a crash cannot tear: content first, names last."""

import ctypes
import os
from pathlib import Path

_WRITE = 2  # SYNC_FILE_RANGE_WRITE of Linux: begin to write what is dirty, wait for nothing
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)


def write_durably(path: Path, content: bytes) -> None:
    """Writes a small file so that, whatever happens, ``path`` holds either its old content or all of ``content``."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # a killed write's; a pipe or a link of this name is not written into
    with open(temporary, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Waits until the names in ``folder`` (not the contents) are on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def begin_writeback(descriptor: int) -> None:
    """Lets the disk begin with what was written to a file, so that a later ``fsync`` finds little left to wait for.

    Only a hint: its errors are those of the ``fsync``, and elsewhere than on Linux it does nothing.
    """
    if _sync_file_range is not None:
        _sync_file_range(descriptor, ctypes.c_int64(0), ctypes.c_int64(0), _WRITE)  # 0 bytes: to the end
