"""The .bin file of a shard, read by ``pread`` into the caller's memory, each block checked when it is first touched."""

import os
import resource
import weakref
from pathlib import Path

import numpy as np
from awscrt.checksums import crc32c
from numpy.typing import NDArray

from megatrain.data.errors import DataError
from megatrain.data.shards.format import BLOCK_SIZE, read_crcs


class TokenFile:
    """Tokens of one shard. Opened at the first read; safe to read from several threads.

    Args:
        size: bytes that the file has.
        crc_path: its block CRCs; None for files of Megatron, which have none.
    """

    def __init__(self, path: Path, dtype: np.dtype, size: int, crc_path: Path | None):
        self.path, self.dtype, self.size = path, dtype, size
        self.num_tokens = size // dtype.itemsize
        self._crc_path, self._item_size = crc_path, dtype.itemsize
        self._descriptor: int | None = None
        self._crcs: list[int] = []
        # a file without CRCs counts as checked
        self._checked = bytearray(b"\1" if crc_path is None else b"\0") * (-(-size // BLOCK_SIZE) + 1)

    def read(self, out: memoryview, first: int) -> None:
        """Fills ``out`` (bytes of whole tokens) with the tokens from number ``first`` on.

        Raises:
            DataError: the file can't be read, was cut, or a block is not as it was written.
        """
        begin = first * self._item_size
        block, last = begin // BLOCK_SIZE, (begin + len(out) - 1) // BLOCK_SIZE
        while block <= last:
            if not self._checked[block]:
                self._check_block(block)
            block += 1
        self._fill(out, begin)

    def _check_block(self, number: int) -> None:
        begin = number * BLOCK_SIZE
        end = min(begin + BLOCK_SIZE, self.size)
        crcs = self._open_crcs()
        content = np.empty(end - begin, np.uint8)
        self._fill(content.data, begin)
        if crc32c(content.data) != crcs[number]:
            raise DataError(
                f"{self.path} is damaged in block {number} (bytes {begin} to {end}): copy or write it again"
            )
        self._checked[number] = 1

    def _fill(self, out: memoryview, at: int) -> None:
        descriptor = self._descriptor if self._descriptor is not None else self._open()
        try:
            count = os.preadv(descriptor, (out,), at)
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}") from error
        if count == len(out):
            return
        if count == 0:
            raise DataError(f"{self.path} ends at byte {at}, expected {self.size} bytes: copy or write it again")
        self._fill(out[count:], at + count)

    def _open(self) -> int:
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}") from error
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def _open_crcs(self) -> list[int]:
        if not self._crcs:
            assert self._crc_path is not None
            block_size, crcs = read_crcs(self._crc_path)
            expected = -(-self.size // BLOCK_SIZE)
            if block_size != BLOCK_SIZE or len(crcs) != expected:
                raise DataError(
                    f"{self._crc_path} holds {len(crcs)} CRCs of {block_size} bytes, expected {expected} of "
                    f"{BLOCK_SIZE}: copy or write the data set again"
                )
            self._crcs = crcs.tolist()
        return self._crcs


def allow_open_files(count: int) -> None:
    """Raises the process's soft limit where a data set has more shards than it allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 1024
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )


def bytes_of(array: NDArray[np.integer]) -> memoryview:
    """The memory of a contiguous array, for ``TokenFile.read``."""
    return array.data.cast("B")
