"""The files of one shard, written as its documents come; memory: one block, and four bytes a document."""

import hashlib
import os
from array import array
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from awscrt.checksums import crc32c
from numpy.typing import NDArray

from megatrain.data.errors import DataError
from megatrain.data.shards.format import BLOCK_SIZE, crc_bytes, index_bytes
from megatrain.data.shards.manifest import Shard
from megatrain.disk.durable import write_durably

_MAX_DOCUMENT_TOKENS = 2**31 - 1  # the index stores lengths as int32


class _Mark(NamedTuple):
    """The state before a document of which not all is there yet."""

    max_id: int
    pending: bytes
    num_crcs: int
    sha256: Any


class ShardWriter:
    """Writes ``stem``.bin, and .idx and .crc when it closes.

    Checkpoints leave a file .lengths, which is needed as long as a writer may go on there: also after ``close``.

    Args:
        state: what ``checkpoint`` returned: goes on there, whatever was written later.
    Raises:
        DataError: the files on disk are shorter than they were at that checkpoint.
    ``num_tokens``, ``num_documents``: complete documents only.
    """

    def __init__(self, stem: Path, dtype: np.dtype, state: dict[str, int] | None = None):
        self.num_tokens = 0
        self._stem = stem
        self._dtype = dtype
        self._lengths = array("i")
        self._max_id = 0
        self._pending = bytearray()
        self._crcs: list[int] = []
        self._sha256 = hashlib.sha256()
        self._mark: _Mark | None = None
        self._begun_tokens = 0
        self._file = open(self._path("bin"), "r+b" if state else "w+b")  # noqa: SIM115, closed by close() or abandon()
        if state:
            self._reopen(state)
        else:
            self._path("lengths").unlink(missing_ok=True)

    @property
    def num_documents(self) -> int:
        return len(self._lengths)

    def add(self, ids: NDArray[np.integer], lengths: NDArray[np.integer]) -> None:
        """Appends whole documents: their token ids [tokens] and ``lengths`` [documents]."""
        self._lengths.frombytes(lengths.astype(np.int32, copy=False).tobytes())
        self.num_tokens += len(ids)
        self._append(ids)

    def add_piece(self, ids: NDArray[np.integer], *, ends: bool) -> None:
        """Appends a piece of a document, which ``drop_pieces`` can take back until it ends.

        Raises:
            DataError: the document is longer than an index can say.
        """
        if self._mark is None:
            crcs = len(self._crcs)
            self._mark = _Mark(self._max_id, bytes(self._pending), crcs, self._sha256.copy())
            self._begun_tokens = 0
        self._begun_tokens += len(ids)
        if self._begun_tokens > _MAX_DOCUMENT_TOKENS:
            raise DataError(f"a document of more than {_MAX_DOCUMENT_TOKENS} tokens cannot be stored: split it")
        self._append(ids)
        if ends:
            self._lengths.append(self._begun_tokens)
            self.num_tokens += self._begun_tokens
            self._mark = None

    def drop_pieces(self) -> None:
        """Takes the pieces of a document back that has not ended."""
        if self._mark is not None:
            self._max_id, pending, crcs, self._sha256 = self._mark
            self._pending = bytearray(pending)
            del self._crcs[crcs:]
            self._file.seek(crcs * BLOCK_SIZE)
            self._mark = None

    def close(self) -> Shard:
        """Completes the files, on disk."""
        self._write(bytes(self._pending))
        self._file.truncate()
        self._sync()
        self._file.close()
        index = index_bytes(np.frombuffer(self._lengths, np.int32), self._dtype)
        crcs = crc_bytes(self._crcs)
        write_durably(self._path("idx"), index)
        write_durably(self._path("crc"), crcs)
        return Shard(
            name=self._stem.name,
            documents=self.num_documents,
            tokens=self.num_tokens,
            max_id=self._max_id,
            bin_sha256=self._sha256.hexdigest(),
            idx_sha256=hashlib.sha256(index).hexdigest(),
        )

    def abandon(self) -> None:
        """Closes the file as it is; without documents it goes."""
        self._file.close()
        if not self.num_documents:
            self._path("bin").unlink()
            self._path("lengths").unlink(missing_ok=True)

    def checkpoint(self) -> dict[str, int]:
        """Brings all documents to disk; what it returns makes another ShardWriter go on here."""
        at = self._file.tell()
        self._file.write(self._pending)
        self._sync()
        self._file.seek(at)
        with open(self._path("lengths"), "ab") as file:
            file.write(memoryview(self._lengths)[file.tell() // 4 :])
            file.flush()
            os.fsync(file.fileno())
        return {"documents": self.num_documents, "tokens": self.num_tokens}

    def _reopen(self, state: dict[str, int]) -> None:
        size = state["tokens"] * self._dtype.itemsize
        with open(self._path("lengths"), "r+b") as file:
            file.truncate(4 * state["documents"])
            self._lengths.frombytes(file.read())
        while self._file.tell() + BLOCK_SIZE <= size:
            self._digest(self._file.read(BLOCK_SIZE))
        self._pending += self._file.read(size - self._file.tell())
        self._file.seek(-len(self._pending), os.SEEK_CUR)
        self._note_max(np.frombuffer(self._pending, self._dtype))
        self.num_tokens = state["tokens"]
        if self.num_documents != state["documents"] or len(self._crcs) * BLOCK_SIZE + len(self._pending) != size:
            raise DataError(f"{self._path('bin')} is shorter than when it was last synced: remove {self._stem.parent}")

    def _append(self, ids: NDArray[np.integer]) -> None:
        self._note_max(ids)
        self._pending += ids.astype(self._dtype, copy=False).data
        whole = len(self._pending) // BLOCK_SIZE * BLOCK_SIZE
        if whole:
            data = bytes(self._pending[:whole])
            self._write(data)
            del self._pending[:whole]

    def _write(self, data: bytes) -> None:
        self._digest(data)
        self._file.write(data)

    def _digest(self, data: bytes) -> None:
        self._crcs += [crc32c(data[at : at + BLOCK_SIZE]) for at in range(0, len(data), BLOCK_SIZE)]
        self._sha256.update(data)

    def _note_max(self, ids: NDArray[np.integer]) -> None:
        self._max_id = max(self._max_id, int(ids.max(initial=0)))

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def _path(self, suffix: str) -> Path:
        return self._stem.with_name(f"{self._stem.name}.{suffix}")
