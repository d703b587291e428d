"""Files of a checkpoint, written and read with their CRC."""

import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

import numpy as np
import numpy.typing as npt
from awscrt.checksums import crc32c

from megatrain.checkpoint.store.errors import CheckpointError, explained
from megatrain.checkpoint.store.manifest import CRC_BYTES, ArraySpec
from megatrain.disk.durable import begin_writeback, fsync_folder

Array = npt.NDArray[Any]
_BLOCK = 2**20  # bytes that stay in a core's cache between the system's copy and the CRC
_AHEAD = 2**23  # bytes after which the disk is told to begin
_WRITERS = 3  # threads that copy to the system; so many files hold data
_SYNCERS = 16  # files that wait for the disk at once: it confirms many together nearly as fast as one
_OPEN = 128  # files that are written but not yet confirmed


class Files:
    """Writes files in threads. ``wait`` returns when the disk has confirmed all of them, or raises what went wrong.

    The disk begins with a file as it is written, and is asked to confirm it (``fsync``, by the descriptor that wrote
    it, which hears of every error) only when many are there: each confirmation alone costs the journal of the file
    system a commit, those that come together share one. What is written must not change before its file is.
    """

    def __init__(self) -> None:
        self._writers = ThreadPoolExecutor(_WRITERS, "checkpoint-write")
        self._syncers = ThreadPoolExecutor(_SYNCERS, "checkpoint-sync")
        self._room = BoundedSemaphore(_WRITERS)
        self._pending: list[Future[Written]] = []

    def write(self, path: Path, label: str, data: Array | bytes, crc_written: Callable[[str], None]) -> None:
        """Writes ``data`` (an array with its CRC behind it) to ``path``; tells the CRC-32C as 8 hex digits.

        Raises:
            CheckpointError: a file before this one could not be written.
        """
        if len(self._pending) >= _OPEN:
            oldest, self._pending = self._pending[: _OPEN // 2], self._pending[_OPEN // 2 :]
            self._confirm(oldest)
        self._room.acquire()
        future = self._writers.submit(self._write, path, label, data, crc_written)
        future.add_done_callback(lambda done: self._room.release())
        self._pending.append(future)

    def _write(self, path: Path, label: str, data: Array | bytes, crc_written: Callable[[str], None]) -> "Written":
        with explained(f"write {label} to {path}"):
            file = open(path, "wb", buffering=0)  # noqa: SIM115 - closed once it is confirmed
            try:
                crc_written(f"{write_with_crc(file, data, trailer=not isinstance(data, bytes)):08x}")
                begin_writeback(file.fileno())
            except BaseException:
                file.close()
                raise
        return Written(path, label, file)

    def sync_folders(self, folders: Iterable[Path]) -> None:
        """Waits until the names in ``folders`` are on disk.

        Raises:
            OSError: one can't be opened or synced.
        """
        for _ in self._syncers.map(fsync_folder, folders):
            pass

    def wait(self) -> None:
        """Returns when all is on disk.

        Raises:
            CheckpointError: a file could not be written; names it and what it was to hold.
        """
        pending, self._pending = self._pending, []
        self._confirm(pending)

    def _confirm(self, pending: list[Future["Written"]]) -> None:
        """All must have ended before an error is raised."""
        problems = [error for future in pending if (error := future.exception())]
        written = [future.result() for future in pending if not future.exception()]
        problems += filter(None, self._syncers.map(Written.confirm, written))
        for problem in problems:
            raise problem

    def close(self) -> None:
        """Ends the threads; what was not waited for is nowhere surely."""
        self._writers.shutdown()
        self._syncers.shutdown()
        for future in self._pending:
            if not future.exception():
                future.result().file.close()


@dataclass(frozen=True)
class Written:
    """A file that the system has, and the disk not yet; still open."""

    path: Path
    label: str
    file: FileIO

    def confirm(self) -> CheckpointError | None:
        """Waits for the disk and closes the file; returns what went wrong."""
        try:
            with explained(f"write {self.label} to {self.path}"), self.file:
                os.fsync(self.file.fileno())
        except CheckpointError as error:
            return error
        return None


def write_with_crc(file: Any, data: Array | bytes, trailer: bool) -> int:
    """Writes all of ``data``, block by block, and its CRC-32C behind it if ``trailer``; returns the CRC."""
    content, crc = _bytes_of(data), 0
    for start in range(0, len(content), _BLOCK):
        block = content[start : start + _BLOCK]
        crc = crc32c(block, crc)
        while block:
            block = block[file.write(block) :]
        if (start + _BLOCK) % _AHEAD == 0:
            begin_writeback(file.fileno())
    if trailer:
        file.write(crc.to_bytes(CRC_BYTES, "little"))
    return crc


def read_with_crc(descriptor: int, out: Array, crc: int = 0) -> tuple[int, bool]:
    """Fills ``out`` from a file; returns the CRC-32C after ``crc`` of the data, and whether all was there."""
    rest = _bytes_of(out)
    while rest:
        block = rest[:_BLOCK]
        count = os.readv(descriptor, [block])
        if not count:
            return crc, False
        crc, rest = crc32c(block[:count], crc), rest[count:]
    return crc, True


def new_array(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Memory for what is read, undefined.

    Raises:
        CheckpointError: the host has less than that in all. (A system may give more, and end the process later.)
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes > (there := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")):
        raise CheckpointError(f"an array of {shape} {dtype.name} takes {num_bytes} bytes; this host has {there} in all")
    try:
        return np.empty(shape, dtype)
    except MemoryError as error:
        raise CheckpointError(f"no memory for an array of {shape} {dtype.name}: {num_bytes} bytes") from error


def crc_of(descriptor: int, num_bytes: int) -> tuple[int, bool]:
    """Reads ``num_bytes`` of a file and keeps none; returns their CRC-32C, and whether all were there."""
    buffer, crc = memoryview(bytearray(min(num_bytes, _BLOCK))), 0
    while num_bytes:
        count = os.readv(descriptor, [buffer[:num_bytes]])
        if not count:
            return crc, False
        crc, num_bytes = crc32c(buffer[:count], crc), num_bytes - count
    return crc, True


def read_part_with_crc(
    descriptor: int, shape: tuple[int, ...], source: tuple[slice, ...], out: Array
) -> tuple[int, bool]:
    """Reads an array of ``shape`` a few rows at a time, which stay in a core's cache, and keeps ``source`` in ``out``.

    Returns the CRC-32C of the whole array, and whether all was there.
    """
    row_bytes = out.itemsize * math.prod(shape[1:])
    rows = new_array((min(shape[0], max(1, _BLOCK // row_bytes)), *shape[1:]), out.dtype)
    wanted, crc = source[0], 0
    for first in range(0, shape[0], len(rows)):
        block = rows[: shape[0] - first]
        crc, complete = read_with_crc(descriptor, block, crc)
        if not complete:
            return crc, False
        low, high = max(first, wanted.start), min(first + len(block), wanted.stop)
        if low < high:
            out[low - wanted.start : high - wanted.start] = block[(slice(low - first, high - first), *source[1:])]
    return crc, True


def _bytes_of(data: Array | bytes) -> memoryview:
    """[number of bytes], the same memory."""
    return memoryview(data) if isinstance(data, bytes) else data.reshape(-1).view(np.uint8).data


def padded(part: Array, spec: ArraySpec) -> Array:
    """``part`` as it is stored: contiguous and of the chunk's full shape."""
    if part.shape == spec.chunk_shape:
        return np.asarray(part, order="C")
    chunk = np.zeros(spec.chunk_shape, part.dtype)
    chunk[tuple(map(slice, part.shape))] = part
    return chunk
