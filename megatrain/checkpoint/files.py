"""Files of a checkpoint: written and read with their CRC, looked at without following links."""

import os
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from megatrain.checkpoint.errors import CheckpointError, explained
from megatrain.checkpoint.manifest import CRC_BYTES, ArraySpec, Index, chunk_file
from megatrain.disk.durable import fsync_folder

Array = npt.NDArray[Any]
_BLOCK = 2**20  # bytes that stay in a core's cache between the disk's copy and the CRC
_COPIES = 4  # files whose data is being handed to the system
_IN_FLIGHT = 32  # files that are not yet confirmed: a disk confirms many together nearly as fast as one


class Files:
    """Writes files in threads. ``wait`` returns when the disk has confirmed all of them, or raises what went wrong.

    What is written must not change before that. At most four files hold data to be written: ``write`` waits for room.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_IN_FLIGHT, "checkpoint-file")
        self._room = BoundedSemaphore(_COPIES)
        self._pending: list[Future[None]] = []

    def write(self, path: Path, label: str, data: Array | bytes, crc_written: Callable[[str], None]) -> None:
        """Writes ``data`` (an array with its CRC behind it) to ``path``; tells the CRC-32C as 8 hex digits."""
        self._room.acquire()
        self._pending.append(self._pool.submit(self._write, path, label, data, crc_written))
        for done in [future for future in self._pending if future.done()]:
            self._pending.remove(done)
            done.result()

    def _write(self, path: Path, label: str, data: Array | bytes, crc_written: Callable[[str], None]) -> None:
        with ExitStack() as room, explained(f"write {label} to {path}"):
            room.callback(self._room.release)
            with open(path, "wb", buffering=0) as file:
                crc_written(f"{write_with_crc(file, data, trailer=not isinstance(data, bytes)):08x}")
                room.close()
                os.fsync(file.fileno())

    def sync_folders(self, folders: Iterable[Path]) -> None:
        """Waits until the names in ``folders`` are on disk.

        Raises:
            OSError: one can't be opened or synced.
        """
        for _ in self._pool.map(fsync_folder, folders):
            pass

    def wait(self) -> None:
        """
        Raises:
            CheckpointError: a file could not be written; names it and what it was to hold.
        """
        pending, self._pending = self._pending, []
        for future in pending:
            future.exception()  # all must have ended before one is reported
        for future in pending:
            future.result()

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown()


def write_with_crc(file: Any, data: Array | bytes, trailer: bool) -> int:
    """Writes all of ``data``, block by block, and its CRC-32C behind it if ``trailer``; returns the CRC."""
    rest, crc = _bytes_of(data), 0
    while rest.size:
        block = rest[:_BLOCK]
        crc = google_crc32c.extend(crc, block)
        while block.size:
            count = file.write(block)
            block, rest = block[count:], rest[count:]
    if trailer:
        file.write(crc.to_bytes(CRC_BYTES, "little"))
    return crc


def read_with_crc(file: Any, out: Array) -> tuple[int, bool]:
    """Fills ``out`` from a file; returns the CRC-32C of the data, and whether all was there with that CRC behind it."""
    rest, crc = _bytes_of(out), 0
    while rest.size:
        count = file.readinto(rest[:_BLOCK])
        if not count:
            return crc, False
        crc, rest = google_crc32c.extend(crc, rest[:count]), rest[count:]
    return crc, file.read(CRC_BYTES) == crc.to_bytes(CRC_BYTES, "little")


def _bytes_of(data: Array | bytes) -> Array:
    """[number of bytes] uint8, the same memory; the CRC's functions take arrays, but no memory views."""
    return np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data.reshape(-1).view(np.uint8)


def padded(part: Array, spec: ArraySpec) -> Array:
    """``part`` as it is stored: contiguous and of the chunk's full shape."""
    if part.shape == spec.chunk_shape:
        return np.asarray(part, order="C")
    chunk = np.zeros(spec.chunk_shape, part.dtype)
    chunk[tuple(map(slice, part.shape))] = part
    return chunk


def require_files(folder: Path, chunks: Iterable[tuple[ArraySpec, Iterable[Index]]]) -> None:
    """Checks that the chunks' files are there, inside the checkpoint and of the right size; names all that aren't."""
    root, problems = Path(os.path.realpath(folder)), []
    for spec, indices in chunks:
        for index in indices:
            relative = f"{spec.folder}/{chunk_file(index)}"
            try:
                num_bytes = inside(root, relative).stat().st_size
                if num_bytes != spec.file_bytes:
                    problems.append(f"{spec.label}: {relative} has {num_bytes} bytes instead of {spec.file_bytes}")
            except FileNotFoundError:
                problems.append(f"{spec.label}: {relative} is missing")
            except (CheckpointError, OSError) as error:
                problems.append(f"{spec.label}: {relative}: {error}")
    if problems:
        raise CheckpointError(f"{folder} is damaged: " + "; ".join(problems))


def inside(root: Path, relative: str) -> Path:
    """A regular file of the checkpoint ``root`` (a path without links); refuses links, which could lead anywhere."""
    path = root / relative
    if os.path.realpath(path) != str(path):
        raise CheckpointError("a link leads elsewhere: refused")
    if path.exists() and not stat.S_ISREG(path.lstat().st_mode):
        raise CheckpointError("not a regular file: refused")
    return path
