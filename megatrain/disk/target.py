"""What a tool is about to write never takes the place of something that is there."""

import os
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
