"""What a tool is about to write never takes the place of something that is there."""

import os
import stat
from pathlib import Path

from megatrain.disk.small import kind_of


def require_free(path: Path, cure: str = "choose another place, or remove it") -> None:
    """Checks that nothing stands at ``path``, be it a link that leads nowhere.

    Args:
        cure: what a person can do, for the message.
    Raises:
        FileExistsError: something does; one line that says what and how to go on.
    """
    if os.path.lexists(path):
        raise FileExistsError(f"{path} is there already ({kind_of(os.lstat(path))}): {cure}")


def require_target(path: Path, overwrite: bool) -> None:
    """Checks that a file may be written to ``path`` by a tool with the option ``--overwrite``.

    Raises:
        FileExistsError: something is there and ``overwrite`` was not asked for, or it is no file.
    """
    if not overwrite:
        require_free(path, "choose another place, or replace it by --overwrite")
    elif os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):
        require_free(path, "--overwrite replaces files alone; choose another place")
