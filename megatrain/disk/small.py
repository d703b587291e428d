"""Reads small files that anybody may have put there: never waits for a pipe, never takes more memory than was said."""

import errno
import os
import stat
from pathlib import Path

SMALL = 2**20  # bytes of a file that a person or one process writes
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFLNK: "a link",
}


def read_regular(path: str | Path, limit: int = SMALL) -> bytes:
    """All bytes of a regular file, which may be reached through links.

    Raises:
        OSError: it isn't there, can't be read, is something else than a regular file, or holds over ``limit`` bytes.
    """
    require_regular(os.stat(path), path)  # a socket can't be opened, and opening a device may do something
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        require_regular(os.fstat(descriptor), path)
        return read_open(descriptor, limit, path)
    finally:
        os.close(descriptor)


def read_open(descriptor: int, limit: int, path: str | Path) -> bytes:
    """What an open regular file holds from its position on; ``path`` is its name in the message.

    Raises:
        OSError: it can't be read, or holds over ``limit`` bytes, of which none is read where its size tells so.
    """
    size = os.fstat(descriptor).st_size
    parts = [os.read(descriptor, min(size, limit) + 1)] if size <= limit else []
    while parts and parts[-1] and sum(map(len, parts)) <= limit:  # it may grow, and one call may give less than all
        parts.append(os.read(descriptor, limit + 1 - sum(map(len, parts))))
    content = b"".join(parts)
    if size > limit or len(content) > limit:
        found = max(size, len(content))
        raise OSError(errno.EFBIG, f"it holds {found} bytes, and what belongs there at most {limit}", str(path))
    return content


def require_regular(status: os.stat_result, path: str | Path) -> None:
    """Checks that ``status`` is that of a regular file.

    Raises:
        OSError: says what it is instead.
    """
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, f"{kind_of(status)}, not a regular file: refused", str(path))


def kind_of(status: os.stat_result) -> str:
    """What stands there, for people: ``a folder``, ``a pipe``, ``a file``, …"""
    return _KINDS.get(stat.S_IFMT(status.st_mode), "a file")
