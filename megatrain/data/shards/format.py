"""The bytes of a shard: Megatron's index (.idx) and the block CRCs (.crc). docs/data_format.md draws them.

A Megatron index speaks of *sequences* grouped into documents; in ours each document is one sequence.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatrain.data.errors import DataError

MAX_UINT16_VOCABULARY = 1 << 16
BLOCK_SIZE = 1 << 20  # bytes of a .bin file under one CRC

_INDEX_START = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document marks
_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_INDEX_VERSION = 1
_DTYPES = {code: np.dtype(f"<{kind}") for code, kind in {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2"}.items()}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}

_CRC_START = struct.Struct("<8sQ")  # magic, bytes of a block
_CRC_MAGIC = b"MTCRC32C"


def token_dtype(vocab_size: int) -> np.dtype:
    """The type in which the tokens of a vocabulary are stored: uint16 where all ids fit, else int32.

    megatron-core's readers take the type either from the index or from exactly this rule. (Its own writer changes
    over at 65,500, so between the two it cannot always read what it wrote.)
    """
    return np.dtype("<u2") if vocab_size <= MAX_UINT16_VOCABULARY else np.dtype("<i4")


@dataclass(frozen=True)
class Index:
    """The head of an .idx file, and where its arrays stand. Counts; ``marks`` is the number of documents + 1."""

    path: Path
    dtype: np.dtype
    sequences: int
    marks: int

    @property
    def num_documents(self) -> int:
        return self.marks - 1

    @property
    def size(self) -> int:
        """Bytes that the file must have."""
        return self._marks_at + 8 * self.marks

    def lengths(self) -> NDArray[np.int32]:
        """Tokens of each sequence, memory-mapped."""
        return np.memmap(self.path, "<i4", "r", _INDEX_START.size, (self.sequences,))

    def pointers(self) -> NDArray[np.int64]:
        """Byte in the .bin file at which each sequence begins, memory-mapped."""
        return np.memmap(self.path, "<i8", "r", self._pointers_at, (self.sequences,))

    def document_marks(self) -> NDArray[np.int64]:
        """Sequence at which each document begins, and last the number of sequences; memory-mapped."""
        return np.memmap(self.path, "<i8", "r", self._marks_at, (self.marks,))

    @property
    def _pointers_at(self) -> int:
        return _INDEX_START.size + 4 * self.sequences

    @property
    def _marks_at(self) -> int:
        return self._pointers_at + 8 * self.sequences


def read_index(path: Path) -> Index:
    """Reads the head of an .idx file and checks it against the file's size.

    Raises:
        DataError: not a Megatron index, of an unknown version or type, empty, or cut short.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(_INDEX_START.size)
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read the index {path}: {error.strerror}") from error
    if len(head) < _INDEX_START.size or not head.startswith(_INDEX_MAGIC):
        raise DataError(f"{path} is not a Megatron index: it does not begin with {_INDEX_MAGIC!r}")
    _, version, code, sequences, marks = _INDEX_START.unpack(head)
    if version != _INDEX_VERSION or code not in _DTYPES:
        raise DataError(
            f"{path}: version {version} and dtype code {code}, "
            f"can read version {_INDEX_VERSION} and codes {sorted(_DTYPES)} (integers)"
        )
    index = Index(path, _DTYPES[code], sequences, marks)
    if sequences < 1 or marks < 2:
        raise DataError(f"{path} holds no documents: take the shard out of the data set")
    if size != index.size:
        raise DataError(f"{path} has {size} bytes, expected {index.size}: copy or write the data set again")
    return index


def index_bytes(lengths: NDArray[np.int32], dtype: np.dtype) -> bytes:
    """The .idx file of a shard whose documents have ``lengths`` tokens [documents]."""
    lengths = np.asarray(lengths, "<i4")
    pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * dtype.itemsize
    marks = np.arange(len(lengths) + 1, dtype="<i8")
    start = _INDEX_START.pack(_INDEX_MAGIC, _INDEX_VERSION, _CODES[dtype], len(lengths), len(marks))
    return start + lengths.tobytes() + pointers.tobytes() + marks.tobytes()


def crc_bytes(crcs: list[int]) -> bytes:
    """The .crc file of a shard whose .bin blocks have the CRC-32C ``crcs``."""
    return _CRC_START.pack(_CRC_MAGIC, BLOCK_SIZE) + np.asarray(crcs, "<u4").tobytes()


def read_crcs(path: Path) -> tuple[int, NDArray[np.uint32]]:
    """The block size in bytes and the CRC-32C of each block.

    Raises:
        DataError: the file is missing or not a list of CRCs.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the block CRCs {path}: {error.strerror}") from error
    body = content[_CRC_START.size :]
    if not content.startswith(_CRC_MAGIC) or len(content) < _CRC_START.size or len(body) % 4:
        raise DataError(f"{path} is not a list of block CRCs: copy or write the data set again")
    return _CRC_START.unpack_from(content)[1], np.frombuffer(body, "<u4")
