"""The files of a checkpoint that is read: looked at and opened without a way out of its folder."""

import errno
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

from megatrain.checkpoint.store.errors import CheckpointError, TransientError, explained, persistently
from megatrain.checkpoint.store.files import Array, crc_of, read_part_with_crc, read_with_crc
from megatrain.checkpoint.store.manifest import CRC_BYTES, ArraySpec, Index, chunk_file
from megatrain.disk.small import read_open, require_regular

_LISTED = 50  # problems of one message


class Tree:
    """All below the folder ``path``, which may itself be reached through a link; a link in it could lead anywhere.

    Paths are strings and files are descriptors here: there are two files a tensor, and what each costs adds up.
    """

    def __init__(self, path: Path):
        self.root = os.path.realpath(path)
        self._folders = {self.root}  # that are no links

    def open(self, relative: str) -> tuple[int, int]:
        """(descriptor, size) of a regular file; to be closed by the caller.

        Raises:
            OSError: it isn't there, can't be opened, is a link or behind one, or not a regular file.
        """
        folder, _, name = relative.rpartition("/")
        path = f"{self._folder(folder)}/{name}"
        try:  # a pipe is not waited for
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):  # of a link, of a socket
                _size_of(os.lstat(path), path)
            raise
        try:
            return descriptor, _size_of(os.fstat(descriptor), path)
        except BaseException:
            os.close(descriptor)
            raise

    def content(self, relative: str, limit: int) -> bytes:
        """A small file that describes others.

        Raises:
            OSError: as ``open``; larger than ``limit`` bytes, which are not read.
        """
        descriptor, _ = self.open(relative)
        try:
            return read_open(descriptor, limit, relative)
        finally:
            os.close(descriptor)

    def read_chunk(self, spec: ArraySpec, file: str, source: tuple[slice, ...], out: Array | None) -> str:
        """Reads a whole chunk, keeps its part ``source`` in ``out`` (None: nothing), and returns the CRC-32C of all.

        Raises:
            CheckpointError: as ``open``; of another size, or its data does not match the CRC behind it.
        """
        relative = f"{spec.folder}/{file}"
        with explained(f"read {spec.label} from {self.root}/{relative}"):
            descriptor, size = self.open(relative)
            try:
                if size != spec.file_bytes:
                    raise CheckpointError(f"{spec.label}: {relative} has {size} bytes instead of {spec.file_bytes}")
                if out is None:
                    crc, complete = crc_of(descriptor, size - CRC_BYTES)
                elif out.shape == spec.chunk_shape and out.flags.c_contiguous:
                    crc, complete = read_with_crc(descriptor, out)
                else:
                    crc, complete = read_part_with_crc(descriptor, spec.chunk_shape, source, out)
                undamaged = complete and os.read(descriptor, CRC_BYTES) == crc.to_bytes(CRC_BYTES, "little")
            finally:
                os.close(descriptor)
        if not undamaged:
            raise CheckpointError(f"{spec.label}: {self.root}/{relative} is damaged: the data does not match its CRC")
        return f"{crc:08x}"

    def read_rows(self, spec: ArraySpec, file: str, first: int, out: Array) -> tuple[int, str] | None:
        """Fills ``out``, contiguous, from row ``first`` of a chunk on. Proves nothing.

        Returns the CRC-32C of ``out``, and that of the chunk as it says itself; None: the file is shorter.
        Raises:
            CheckpointError: as ``open``.
        """
        relative = f"{spec.folder}/{file}"
        with explained(f"read {spec.label} from {self.root}/{relative}"):
            descriptor, size = self.open(relative)
            try:
                if size != spec.file_bytes:
                    return None
                os.lseek(descriptor, first * (size - CRC_BYTES) // spec.chunk_shape[0], os.SEEK_SET)
                crc, complete = read_with_crc(descriptor, out)
                trailer = os.pread(descriptor, CRC_BYTES, size - CRC_BYTES)
            finally:
                os.close(descriptor)
        return (crc, f"{int.from_bytes(trailer, 'little'):08x}") if complete and len(trailer) == CRC_BYTES else None

    def require(self, chunks: Iterable[tuple[ArraySpec, Iterable[Index]]]) -> None:
        """Checks that the chunks' files are there and of the right size.

        Raises:
            CheckpointError: names the first fifty that aren't, and those that are links or behind one.
        """
        problems, count = [], 0
        for spec, indices in chunks:
            for index in indices:
                relative = f"{spec.folder}/{chunk_file(index)}"
                try:
                    num_bytes = persistently(partial(self._size, relative))
                except TransientError:  # the next file would be waited for as long
                    raise
                except CheckpointError as error:
                    problem = str(error)
                else:
                    if num_bytes == spec.file_bytes:
                        continue
                    state = "is missing" if num_bytes is None else f"has {num_bytes} bytes instead of {spec.file_bytes}"
                    problem = f"{relative} {state}"
                count += 1
                if count <= _LISTED:
                    problems.append(f"{spec.label}: {problem}")
        if problems:
            more = f"; and {count - _LISTED} more" if count > _LISTED else ""
            raise CheckpointError(f"{self.root} is damaged: " + "; ".join(problems) + more)

    def _size(self, relative: str) -> int | None:
        """Bytes of a file; None: it is missing."""
        folder, _, name = relative.rpartition("/")
        with explained(f"look at {self.root}/{relative}"), suppress(FileNotFoundError):
            path = f"{self._folder(folder)}/{name}"
            return _size_of(os.lstat(path), path)
        return None

    def _folder(self, relative: str) -> str:
        """Path of a folder, once it is sure that neither it nor one above it is a link."""
        path = f"{self.root}/{relative}" if relative else self.root
        if path not in self._folders:
            self._folder(relative.rpartition("/")[0])
            if stat.S_ISLNK(os.lstat(path).st_mode):
                raise _link(path)
            self._folders.add(path)
        return path


def _size_of(status: os.stat_result, path: str) -> int:
    if stat.S_ISLNK(status.st_mode):
        raise _link(path)
    require_regular(status, path)
    return status.st_size


def _link(path: str) -> OSError:
    return OSError(errno.ELOOP, "a link leads elsewhere: refused", path)
