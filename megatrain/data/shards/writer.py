"""Documents -> a data-set folder.

Everything is written beside the final place, in ``.NAME.partial``, and takes its name in one rename when it is
complete and on disk. A killed writer so leaves either the old data set or none, never a part of one.
"""

import fcntl
import hashlib
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from megatrain.data.errors import DataError
from megatrain.data.shards.format import token_dtype
from megatrain.data.shards.manifest import MANIFEST, TOKENIZER, Manifest, Shard
from megatrain.data.shards.shard_writer import ShardWriter
from megatrain.disk.durable import fsync_folder, write_durably

BAD_RECORDS = "bad_records.txt"


class DatasetWriter:
    """Writes a data set document by document; ``finish`` makes it exist.

    Leaving the ``with`` early leaves nothing, but after an interruption (not a DataError) what ``resume`` needs.
    One writer at a time has a folder.

    Args:
        folder: where the data set will stand; an older *data set* there is replaced by ``finish``.
        tokenizer: content of the tokenizer.json, copied into the folder.
        tokenizer_name: what people call it.
        vocab_size: ids are below this.
        eod_id: the end-of-document token, which the caller has put at the end of each document.
        shard_tokens: a shard is closed by the document that reaches this many tokens.
        made_from: the settings and inputs that the content is a function of, for the manifest.
        resume: what ``checkpoint`` returned, to go on there; None: from the start.
    Raises:
        DataError: ``folder`` is there and is something else than a data set, or another process writes it.
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
        resume: dict[str, Any] | None = None,
    ):
        self.folder = folder.absolute()
        self.dtype = token_dtype(vocab_size)
        self._vocab_size = vocab_size
        self._eod_id = eod_id
        self._tokenizer = tokenizer
        self._tokenizer_name = tokenizer_name
        self._shard_tokens = shard_tokens
        self.made_from = made_from or {}
        self._shards: list[Shard] = []
        self._open: ShardWriter | None = None
        self._finished = False
        self.partial = partial_of(folder)
        self._replaced = self.folder.with_name(f".{self.folder.name}.replaced")
        self._check_place()
        self._lock = lock_folder(self.partial, self.folder)
        if resume is None:
            self._clear()
        else:
            self._shards = [Shard(**shard) for shard in resume["shards"]]
            if resume["open"] is not None:
                self._open = ShardWriter(self._stem(), self.dtype, resume["open"])

    @property
    def num_shards(self) -> int:
        """Finished shards."""
        return len(self._shards)

    def add(self, document: NDArray[np.integer]) -> None:
        """Appends the token ids [tokens] of one document.

        Raises:
            DataError: the document is empty, or an id is not in the vocabulary.
        """
        self.add_many(document, np.array([len(document)]))

    def add_many(self, ids: NDArray[np.integer], lengths: NDArray[np.integer]) -> None:
        """Appends documents: their token ids [tokens], one after the other, and ``lengths`` [documents].

        Raises:
            DataError: a document is empty, or an id is not in the vocabulary.
        """
        if not lengths.all():
            raise DataError("a document without tokens cannot be stored: leave it out")
        self._check_ids(ids)
        ends = np.cumsum(lengths)
        done = tokens = 0
        while done < len(lengths):
            shard = self._shard()
            room = self._shard_tokens - shard.num_tokens
            following = min(int(np.searchsorted(ends, tokens + room)) + 1, len(lengths))
            following = max(following, done + 1)
            end = int(ends[following - 1])
            shard.add(ids[tokens:end], lengths[done:following])
            done, tokens = following, end
            self._close_if_full()

    def add_piece(self, ids: NDArray[np.integer], *, ends: bool) -> None:
        """Appends the next token ids [tokens] of one document; ``ends``: it is complete.

        Raises:
            DataError: an id is not in the vocabulary, or the document is too long to be stored.
        """
        self._check_ids(ids)
        self._shard().add_piece(ids, ends=ends)
        if ends:
            self._close_if_full()

    def drop_pieces(self) -> None:
        """Takes the pieces of a document back that has not ended."""
        if self._open is not None:
            self._open.drop_pieces()

    def add_shard(self, folder: Path, shard: Shard) -> None:
        """Appends a copy of a finished shard of another data set in ``folder``.

        Raises:
            DataError: it is not as its manifest says.
        """
        self.close_shard()
        copied = replace(shard, name=self._stem().name)
        for suffix, expected in (("bin", shard.bin_sha256), ("idx", shard.idx_sha256), ("crc", None)):
            source = folder / f"{shard.name}.{suffix}"
            with open(source, "rb") as file, open(self.partial / f"{copied.name}.{suffix}", "w+b") as copy:
                shutil.copyfileobj(file, copy, 1 << 20)
                copy.flush()
                os.fsync(copy.fileno())
                copy.seek(0)
                if expected and hashlib.file_digest(copy, "sha256").hexdigest() != expected:
                    raise DataError(f"{source} is damaged: its SHA-256 is not {expected}")
        self._shards.append(copied)

    def checkpoint(self) -> dict[str, Any]:
        """Brings everything to disk; returns, for JSON, what ``resume`` needs to go on here."""
        opened = self._open.checkpoint() if self._open is not None else None
        return {"shards": [asdict(shard) for shard in self._shards], "open": opened}

    def finish(self, lineage: dict[str, Any] | None = None, bad_records_sha256: str = "") -> Manifest:
        """Completes the data set and gives it its name.

        Args:
            lineage: where the data comes from, for the manifest.
            bad_records_sha256: digest of the file BAD_RECORDS, where the caller has put one into ``partial``.
        Raises:
            DataError: no document was added.
        """
        self.close_shard()
        if not self._shards:
            raise DataError(
                f"no documents for {self.folder}: the inputs hold none with text, or none of them fell to this data "
                "set (see --validation-share)"
            )
        for lengths in self.partial.glob("*.lengths"):
            lengths.unlink()
        write_durably(self.partial / TOKENIZER, self._tokenizer)
        manifest = Manifest(
            tokenizer=self._tokenizer_name,
            tokenizer_sha256=hashlib.sha256(self._tokenizer).hexdigest(),
            vocab_size=self._vocab_size,
            dtype=self.dtype.name,
            eod_id=self._eod_id,
            shards=tuple(self._shards),
            bad_records_sha256=bad_records_sha256,
            made_from=self.made_from,
            lineage=lineage or {},
        )
        manifest.write(self.partial)
        if self.folder.exists():
            self.folder.rename(self._replaced)
        self.partial.rename(self.folder)
        self._finished = True
        fsync_folder(self.folder.parent)
        shutil.rmtree(self._replaced, ignore_errors=True)
        return manifest

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._open is not None:
            self._open.abandon()
        if not self._finished and (kind is None or issubclass(kind, DataError)):
            shutil.rmtree(self.partial, ignore_errors=True)
        os.close(self._lock)

    def _check_place(self) -> None:
        # A kill between the two renames of ``finish`` left the older data set, whole, under the hidden name.
        if self._replaced.exists() and not self.folder.exists():
            self._replaced.rename(self.folder)
        is_dataset = (self.folder / MANIFEST).is_file()
        is_empty = self.folder.is_dir() and not any(self.folder.iterdir())
        if os.path.lexists(self.folder) and not is_dataset and not is_empty:
            raise DataError(f"{self.folder} is there and is not a data set: choose another place or remove it")

    def _clear(self) -> None:
        shutil.rmtree(self._replaced, ignore_errors=True)
        for path in self.partial.iterdir():
            path.unlink()

    def _check_ids(self, ids: NDArray[np.integer]) -> None:
        low, high = int(ids.min(initial=0)), int(ids.max(initial=0))
        if low < 0 or high >= self._vocab_size:
            raise DataError(f"token id {low if low < 0 else high} is outside the vocabulary of {self._vocab_size}")

    def _stem(self) -> Path:
        return self.partial / f"tokens-{len(self._shards):05d}"

    def _shard(self) -> ShardWriter:
        if self._open is None:
            self._open = ShardWriter(self._stem(), self.dtype)
        return self._open

    def _close_if_full(self) -> None:
        if self._open is not None and self._open.num_tokens >= self._shard_tokens:
            self.close_shard()

    def close_shard(self) -> None:
        """Ends the shard, if it has begun."""
        if self._open is not None:
            if self._open.num_documents:
                self._shards.append(self._open.close())
            else:
                self._open.abandon()
            self._open = None


def partial_of(folder: Path) -> Path:
    """Where a data set is written until it is complete."""
    return folder.absolute().with_name(f".{folder.absolute().name}.partial")


def lock_folder(partial: Path, folder: Path) -> int:
    """Makes ``partial`` and locks it until the returned descriptor closes, which the system does for a killed process.

    Raises:
        DataError: another process has it; ``folder`` is its name in the message.
    """
    while True:
        partial.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise DataError(f"another process is writing {folder}: wait for it, or choose another place") from error
        # the other may have finished, and renamed the folder, between the two lines above
        if partial.exists() and os.path.samestat(os.fstat(descriptor), partial.stat()):
            return descriptor
        os.close(descriptor)
