"""Documents -> a data-set folder.

Everything is written beside the final place, in ``.NAME.partial``, and takes its name in one rename when it is
complete and on disk. A killed writer so leaves either the old data set or none, never a part of one.
"""

import hashlib
import os
import shutil
from array import array
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from megatrain.data.durable import fsync_folder, write_durably
from megatrain.data.errors import DataError
from megatrain.data.format import BLOCK_SIZE, crc_bytes, index_bytes, token_dtype
from megatrain.data.manifest import MANIFEST, TOKENIZER, Manifest, Shard


class DatasetWriter:
    """Writes a data set document by document; ``finish`` makes it exist. Leaving the ``with`` early leaves nothing.

    Args:
        folder: where the data set will stand; an older *data set* there is replaced by ``finish``.
        tokenizer: content of the tokenizer.json, copied into the folder.
        tokenizer_name: what people call it.
        vocab_size: ids are below this.
        eod_id: the end-of-document token, which the caller has put at the end of each document.
        shard_tokens: a shard is closed by the document that reaches this many tokens.
        made_from: the settings and inputs that the content is a function of, for the manifest.
    Raises:
        DataError: ``folder`` is there and is something else than a data set.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tokenizer: bytes,
        tokenizer_name: str,
        vocab_size: int,
        eod_id: int,
        shard_tokens: int = 100_000_000,
        made_from: dict[str, Any] | None = None,
    ):
        self.folder = folder.absolute()
        self.dtype = token_dtype(vocab_size)
        self._vocab_size = vocab_size
        self._eod_id = eod_id
        self._tokenizer = tokenizer
        self._tokenizer_name = tokenizer_name
        self._shard_tokens = shard_tokens
        self._made_from = made_from or {}
        self._shards: list[Shard] = []
        self._open: _ShardWriter | None = None
        self._partial = self.folder.with_name(f".{self.folder.name}.partial")
        self._replaced = self.folder.with_name(f".{self.folder.name}.replaced")
        self._prepare()

    def add(self, document: NDArray[np.integer]) -> None:
        """Appends the token ids [tokens] of one document.

        Raises:
            DataError: the document is empty, or an id is not in the vocabulary.
        """
        if not len(document):
            raise DataError("a document without tokens cannot be stored: leave it out")
        low, high = int(document.min()), int(document.max())
        if low < 0 or high >= self._vocab_size:
            raise DataError(f"token id {low if low < 0 else high} is outside the vocabulary of {self._vocab_size}")
        if self._open is None:
            self._open = _ShardWriter(self._partial / f"tokens-{len(self._shards):05d}", self.dtype)
        self._open.add(document, high)
        if self._open.num_tokens >= self._shard_tokens:
            self._close_shard()

    def finish(self) -> Manifest:
        """Completes the data set and gives it its name.

        Raises:
            DataError: no document was added.
        """
        self._close_shard()
        if not self._shards:
            raise DataError(
                f"no documents for {self.folder}: the input holds no text, or too little for this share of it"
            )
        write_durably(self._partial / TOKENIZER, self._tokenizer)
        manifest = Manifest(
            tokenizer=self._tokenizer_name,
            tokenizer_sha256=hashlib.sha256(self._tokenizer).hexdigest(),
            vocab_size=self._vocab_size,
            dtype=self.dtype.name,
            eod_id=self._eod_id,
            shards=tuple(self._shards),
            made_from=self._made_from,
        )
        manifest.write(self._partial)
        if self.folder.exists():
            self.folder.rename(self._replaced)
        self._partial.rename(self.folder)
        fsync_folder(self.folder.parent)
        shutil.rmtree(self._replaced, ignore_errors=True)
        return manifest

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._open is not None:
            self._open.file.close()
        shutil.rmtree(self._partial, ignore_errors=True)

    def _prepare(self) -> None:
        # A kill between the two renames of ``finish`` left the older data set, whole, under the hidden name.
        if self._replaced.exists() and not self.folder.exists():
            self._replaced.rename(self.folder)
        is_dataset = (self.folder / MANIFEST).is_file()
        if self.folder.exists() and not is_dataset and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise DataError(f"{self.folder} is there and is not a data set: choose another place or remove it")
        for stump in (self._partial, self._replaced):
            shutil.rmtree(stump, ignore_errors=True)
        self._partial.mkdir(parents=True)

    def _close_shard(self) -> None:
        if self._open is not None:
            self._shards.append(self._open.close())
            self._open = None


class _ShardWriter:
    """The files of one shard; memory: one block, and four bytes a document."""

    def __init__(self, stem: Path, dtype: np.dtype):
        self.file = open(stem.with_name(f"{stem.name}.bin"), "wb")  # noqa: SIM115, closed by the DatasetWriter
        self.num_tokens = 0
        self._stem = stem
        self._dtype = dtype
        self._lengths = array("i")
        self._max_id = 0
        self._pending = bytearray()
        self._crcs: list[int] = []
        self._sha256 = hashlib.sha256()

    def add(self, document: NDArray[np.integer], max_id: int) -> None:
        self._lengths.append(len(document))
        self.num_tokens += len(document)
        self._max_id = max(self._max_id, max_id)
        self._pending += document.astype(self._dtype).tobytes()
        whole = len(self._pending) // BLOCK_SIZE * BLOCK_SIZE
        if whole:
            self._write(bytes(self._pending[:whole]))
            del self._pending[:whole]

    def close(self) -> Shard:
        self._write(bytes(self._pending))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        index = index_bytes(np.frombuffer(self._lengths, np.int32), self._dtype)
        write_durably(self._stem.with_name(f"{self._stem.name}.idx"), index)
        write_durably(self._stem.with_name(f"{self._stem.name}.crc"), crc_bytes(self._crcs))
        return Shard(
            name=self._stem.name,
            documents=len(self._lengths),
            tokens=self.num_tokens,
            max_id=self._max_id,
            bin_sha256=self._sha256.hexdigest(),
            idx_sha256=hashlib.sha256(index).hexdigest(),
        )

    def _write(self, data: bytes) -> None:
        self._crcs += [google_crc32c.value(data[at : at + BLOCK_SIZE]) for at in range(0, len(data), BLOCK_SIZE)]
        self._sha256.update(data)
        self.file.write(data)
