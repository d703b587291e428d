"""A data-set folder -> one stream of tokens, memory-mapped."""

import functools
import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from megatrain.data.errors import DataError
from megatrain.data.format import Index, read_crcs, read_index
from megatrain.data.manifest import MANIFEST, TOKENIZER, Manifest, Shard, digest_of


class TokenDataset:
    """The documents of all shards, one after the other, as one stream of tokens. Made by ``open``.

    ``num_tokens``, ``num_documents``: counts; ``vocab_size``, ``eod_id``, ``tokenizer_path``: None where a Megatron
    folder without a manifest doesn't say.
    """

    def __init__(self, folder: Path, shards: list["_ShardFiles"], manifest: Manifest | None, id_limit: int | None):
        self.folder = folder
        self.manifest = manifest
        self.vocab_size = manifest.vocab_size if manifest else None
        self.eod_id = manifest.eod_id if manifest else None
        self.tokenizer_path = folder / TOKENIZER if manifest else None
        self._shards = shards
        self._id_limit = id_limit
        self._token_ends = np.cumsum([shard.num_tokens for shard in shards])
        self._document_ends = np.cumsum([shard.index.num_documents for shard in shards])
        self.num_tokens = int(self._token_ends[-1])
        self.num_documents = int(self._document_ends[-1])

    @classmethod
    def open(cls, folder: str | Path, *, vocab_size: int | None = None) -> Self:
        """Opens a data set; reads the heads of its files only, whatever their size.

        A folder of Megatron .bin/.idx pairs without a manifest is opened with a warning.

        Args:
            vocab_size: the model's; ids at or above it are refused.
        Raises:
            DataError: no data set, a missing or cut file, or a vocabulary larger than ``vocab_size``.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise DataError(f"no data set at {folder}: no such folder. data_tools/tokenize_text.py makes one")
        if not (folder / MANIFEST).is_file():
            return cls(folder, _megatron_shards(folder), None, vocab_size)
        manifest = Manifest.read(folder)
        if vocab_size is not None and manifest.vocab_size > vocab_size:
            raise DataError(
                f"the data set {folder} has a vocabulary of {manifest.vocab_size} tokens ({manifest.tokenizer}), the "
                f"model has {vocab_size}: set model.vocab_size to at least {manifest.vocab_size}, or tokenize anew"
            )
        if not manifest.shards:
            raise DataError(f"{folder / MANIFEST} lists no shards")
        shards = [_open_shard(folder / shard.name, shard, manifest.dtype) for shard in manifest.shards]
        return cls(folder, shards, manifest, vocab_size)

    @functools.cached_property
    def digest(self) -> str:
        """Names the content, wherever it stands. Without a manifest, the first use reads all files."""
        if self.manifest:
            return digest_of([digest for s in self.manifest.shards for digest in (s.bin_sha256, s.idx_sha256)])
        return digest_of([_sha256(path) for shard in self._shards for path in (shard.bin_path, shard.index.path)])

    def tokens(self, start: int, count: int) -> NDArray[np.int64]:
        """Tokens [count] of the stream from number ``start`` on.

        Raises:
            IndexError: the stream doesn't hold them.
            DataError: an id is not in the model's vocabulary.
        """
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise IndexError(f"tokens {start} to {start + count} of a data set of {self.num_tokens}")
        found = np.empty(count, np.int64)
        filled = 0
        while filled < count:
            at = int(np.searchsorted(self._token_ends, start + filled, side="right"))
            shard = self._shards[at]
            inside = start + filled - (int(self._token_ends[at]) - shard.num_tokens)
            part = shard.tokens[inside : inside + count - filled]
            found[filled : filled + len(part)] = part
            filled += len(part)
        self._check_ids(found, start)
        return found

    def document(self, number: int) -> NDArray[np.int64]:
        """Tokens of document ``number``, its end-of-document token included.

        Raises:
            IndexError: there is no such document.
        """
        if not 0 <= number < self.num_documents:
            raise IndexError(f"document {number} of a data set of {self.num_documents}")
        at = int(np.searchsorted(self._document_ends, number, side="right"))
        shard = self._shards[at]
        inside = number - (int(self._document_ends[at]) - shard.index.num_documents)
        begin, end = shard.document_bounds(inside)
        shard_start = int(self._token_ends[at]) - shard.num_tokens
        return self.tokens(shard_start + begin, end - begin)

    def verify(self) -> None:
        """Reads every byte and compares it with the manifest's digests and the block CRCs.

        Raises:
            DataError: something differs (names the file and the first bad block), or there is no manifest.
        """
        if self.manifest is None:
            raise DataError(f"{self.folder} has no {MANIFEST}, so nothing to compare its files with")
        for shard, files in zip(self.manifest.shards, self._shards, strict=True):
            files.check_blocks()
            for path, expected in ((files.bin_path, shard.bin_sha256), (files.index.path, shard.idx_sha256)):
                if (found := _sha256(path)) != expected:
                    raise DataError(f"{path} is damaged: SHA-256 {found}, expected {expected}. Copy or write it again")
        tokenizer = self.folder / TOKENIZER
        if not tokenizer.is_file() or _sha256(tokenizer) != self.manifest.tokenizer_sha256:
            raise DataError(f"{tokenizer} is not the tokenizer that the data set was written with: put it back")

    def _check_ids(self, tokens: NDArray[np.int64], start: int) -> None:
        if self._id_limit is None or not len(tokens) or (tokens.min() >= 0 and tokens.max() < self._id_limit):
            return
        at = int(np.argmax((tokens < 0) | (tokens >= self._id_limit)))
        raise DataError(
            f"token {start + at} of {self.folder} is {tokens[at]}, outside the model's vocabulary of {self._id_limit}: "
            "the data set is damaged or made for a larger model.vocab_size"
        )


@dataclass(frozen=True)
class _ShardFiles:
    """An opened .bin/.idx pair."""

    bin_path: Path
    index: Index
    tokens: NDArray[np.integer]

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def document_bounds(self, number: int) -> tuple[int, int]:
        """First token of document ``number`` and the first one after it, in this shard."""
        pointers = self.index.pointers()
        first, last = (int(mark) for mark in self.index.document_marks()[number : number + 2])
        ends = [int(pointers[i]) if i < len(pointers) else self.tokens.nbytes for i in (first, last)]
        return ends[0] // self.tokens.itemsize, ends[1] // self.tokens.itemsize

    def check_blocks(self) -> None:
        block_size, crcs = read_crcs(self.bin_path.with_suffix(".crc"))
        with open(self.bin_path, "rb") as file:
            for number, crc in enumerate(crcs):
                if google_crc32c.value(file.read(block_size)) != crc:
                    raise DataError(
                        f"{self.bin_path} is damaged in block {number} (bytes {number * block_size} to "
                        f"{(number + 1) * block_size}): copy or write it again"
                    )


def _open_shard(stem: Path, listed: Shard | None = None, dtype: str | None = None) -> _ShardFiles:
    """Opens ``stem``.bin and .idx, and checks that their sizes agree with each other and with the manifest."""
    bin_path, index_path = (stem.with_name(f"{stem.name}.{suffix}") for suffix in ("bin", "idx"))
    for path in (bin_path, index_path):
        if not path.is_file():
            raise DataError(f"missing file of the data set: {path}. Copy or write the data set again")
    index = read_index(index_path)
    last_length, last_pointer = int(index.lengths()[-1]), int(index.pointers()[-1])
    expected, found = last_pointer + last_length * index.dtype.itemsize, bin_path.stat().st_size
    if found != expected or not found:
        raise DataError(f"{bin_path} has {found} bytes, expected {expected}: copy or write the data set again")
    files = _ShardFiles(bin_path, index, np.memmap(bin_path, index.dtype, "r"))
    if listed is not None:
        pairs = ((files.num_tokens, listed.tokens), (index.num_documents, listed.documents), (index.dtype.name, dtype))
        for kind, (has, says) in zip(("tokens", "documents", "dtype"), pairs, strict=True):
            if has != says:
                raise DataError(
                    f"{bin_path} and its index have {kind} {has}, but {MANIFEST} expects {says}: "
                    "copy or write the data set again"
                )
    return files


def _megatron_shards(folder: Path) -> list[_ShardFiles]:
    stems = sorted(path.with_suffix("") for path in folder.glob("*.idx"))
    if not stems:
        raise DataError(
            f"no data set at {folder}: neither {MANIFEST} nor .bin/.idx files. An interrupted data_tools/"
            "tokenize_text.py leaves none: run it again"
        )
    warnings.warn(
        f"{folder} has no {MANIFEST}: read as Megatron shards {', '.join(stem.name for stem in stems)}; "
        "its vocabulary and tokenizer can't be checked",
        stacklevel=3,
    )
    return [_open_shard(stem) for stem in stems]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
