"""Writes that a crash cannot tear: content first, names last."""

import os
from pathlib import Path


def write_durably(path: Path, content: bytes) -> None:
    """Writes a small file so that, whatever happens, ``path`` holds either its old content or all of ``content``."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
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
