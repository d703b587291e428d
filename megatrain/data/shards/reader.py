"""A data-set folder -> one stream of tokens, read into the caller's memory."""

import functools
import hashlib
import itertools
import warnings
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from megatrain.data.errors import DataError
from megatrain.data.file_names import DEFAULT_SUFFIXES, plain, summary
from megatrain.data.shards.format import Index, read_index
from megatrain.data.shards.manifest import MANIFEST, TOKENIZER, Manifest, Shard, digest_of
from megatrain.data.shards.shards import TokenFile, allow_open_files, bytes_of

_SAMPLED_BYTES, _MAX_SAMPLES = 1 << 16, 256  # of each Megatron shard, for its digest


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
        self.dtype = shards[0].index.dtype
        self._shards = shards
        self._id_limit = id_limit
        self._token_ends = list(itertools.accumulate(shard.tokens.num_tokens for shard in shards))
        self._document_ends = np.cumsum([shard.index.num_documents for shard in shards])
        self._checked_indexes = manifest is None
        self.num_tokens = self._token_ends[-1]
        self.num_documents = int(self._document_ends[-1])
        allow_open_files(len(shards))

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
            raise DataError(_no_folder(folder))
        if not (folder / MANIFEST).is_file():
            return cls(folder, _megatron_shards(folder), None, vocab_size)
        manifest = Manifest.read(folder)
        if vocab_size is not None and manifest.vocab_size > vocab_size:
            raise DataError(
                f"the data set {folder} has a vocabulary of {manifest.vocab_size} tokens ({manifest.tokenizer}), the "
                f"model has {vocab_size}: set model.vocab_size to at least {manifest.vocab_size}, or tokenize anew"
            )
        shards = [_open_shard(folder / shard.name, shard, manifest.dtype) for shard in manifest.shards]
        return cls(folder, shards, manifest, vocab_size)

    @functools.cached_property
    def digest(self) -> str:
        """Names the content, wherever it stands. Without a manifest: of the indexes and samples of the tokens."""
        if self.manifest:
            return digest_of([digest for s in self.manifest.shards for digest in (s.bin_sha256, s.idx_sha256)])
        return digest_of([text for s in self._shards for text in (_sampled_sha256(s.tokens), _sha256(s.index.path))])

    def read(self, starts: NDArray[np.int64], out: NDArray[np.integer]) -> None:
        """Fills the rows of ``out`` [N, count] (of the data set's type) with the tokens from ``starts`` [N] on.

        The stream is a ring: after its last token comes its first.

        Raises:
            DataError: a damaged file, or an id that is not in the model's vocabulary.
        """
        count, whole, at = out.shape[1], bytes_of(out), 0
        row_bytes = count * out.itemsize
        for start in starts.tolist():
            shard, first, left = self._place(start)
            view = whole[at : at + row_bytes]
            if count <= left:
                shard.read(view, first)
            else:
                self._read_over_ends(view, start)
            at += row_bytes
        self._check_ids(out, starts)

    def _read_over_ends(self, view: memoryview, start: int) -> None:
        """A window that goes on in the next shards, or at the stream's start."""
        while len(view):
            shard, first, left = self._place(start)
            size = min(len(view), left * self.dtype.itemsize)
            shard.read(view[:size], first)
            view, start = view[size:], (start + left) % self.num_tokens

    def _place(self, token: int) -> tuple[TokenFile, int, int]:
        """The file of a token of the stream, the token's number in it, and how many tokens it has from there on."""
        at = bisect_right(self._token_ends, token)
        shard, left = self._shards[at].tokens, self._token_ends[at] - token
        return shard, shard.num_tokens - left, left

    def tokens(self, start: int, count: int) -> NDArray[np.int64]:
        """Tokens [count] of the stream from number ``start`` on.

        Raises:
            IndexError: the stream doesn't hold them.
            DataError: as ``read``.
        """
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise IndexError(f"tokens {start} to {start + count} of a data set of {self.num_tokens}")
        found = np.empty((1, count), self.dtype)
        if count:
            self.read(np.array([start]), found)
        return found[0].astype(np.int64)

    def document(self, number: int) -> NDArray[np.int64]:
        """Tokens of document ``number``, its end-of-document token included.

        Raises:
            IndexError: there is no such document.
        """
        begin, end = self.document_bounds(number)
        return self.tokens(begin, end - begin)

    def document_bounds(self, number: int) -> tuple[int, int]:
        """First token of document ``number`` and the first one after it.

        Raises:
            IndexError: there is no such document.
            DataError: an index is damaged.
        """
        self._check_indexes()
        if not 0 <= number < self.num_documents:
            raise IndexError(f"document {number} of a data set of {self.num_documents}")
        at = int(np.searchsorted(self._document_ends, number, side="right"))
        shard = self._shards[at]
        inside = number - (int(self._document_ends[at]) - shard.index.num_documents)
        shard_start = self._token_ends[at] - shard.tokens.num_tokens
        begin, end = shard.document_bounds(inside)
        return shard_start + begin, shard_start + end

    def document_of(self, token: int) -> int:
        """Number of the document that holds token number ``token`` of the stream."""
        first, last = 0, self.num_documents - 1
        while first < last:
            middle = (first + last) // 2
            if self.document_bounds(middle)[1] <= token:
                first = middle + 1
            else:
                last = middle
        return first

    def document_begins(self, start: int, count: int) -> NDArray[np.bool_]:
        """Whether each of the tokens [count] from ``start`` on (on the ring) is the first of a document."""
        begins = np.zeros(count, bool)
        document = self.document_of(start)
        at = self.document_bounds(document)[0] - start
        while at < count:
            if at >= 0:
                begins[at] = True
            first, end = self.document_bounds(document)
            at, document = at + end - first, (document + 1) % self.num_documents
        return begins

    def document_lengths(self, first: int, end: int) -> NDArray[np.int32]:
        """Tokens of the documents ``first`` to ``end - 1``.

        Raises:
            DataError: an index is damaged.
        """
        self._check_indexes()
        parts = []
        for shard, last in zip(self._shards, self._document_ends.tolist(), strict=True):
            begin = last - shard.index.num_documents
            if begin < end and first < last:
                parts.append(shard.document_lengths(max(first, begin) - begin, min(end, last) - begin))
        return np.concatenate(parts)

    def _check_indexes(self) -> None:
        """Compares the .idx files with the manifest's digests, before their first use: bounds are not served unseen."""
        if self._checked_indexes or self.manifest is None:
            return
        for shard, files in zip(self.manifest.shards, self._shards, strict=True):
            _compare(files.index.path, shard.idx_sha256)
        self._checked_indexes = True

    def _check_ids(self, rows: NDArray[np.integer], starts: NDArray[np.int64]) -> None:
        limit = self._id_limit
        if limit is None or not rows.size or (rows.max() < limit and (rows.dtype.kind == "u" or rows.min() >= 0)):
            return
        row, at = np.argwhere((rows < 0) | (rows >= limit))[0]
        token = int((starts[row] + at) % self.num_tokens)
        document = self.document_of(token)
        shard = self._place(token)[0].path.name
        raise DataError(
            f"token {token} of {self.folder} ({shard}, document {document}, its token "
            f"{token - self.document_bounds(document)[0]}) is {rows[row, at]}, outside the model's vocabulary of "
            f"{limit}: the data set is damaged or made for a larger model.vocab_size"
        )


@dataclass(frozen=True)
class _ShardFiles:
    """An opened .bin/.idx pair."""

    tokens: TokenFile
    index: Index

    def document_bounds(self, number: int) -> tuple[int, int]:
        """First token of document ``number`` and the first one after it, in this shard."""
        pointers = self.index.pointers()
        first, last = (int(mark) for mark in self.index.document_marks()[number : number + 2])
        ends = [int(pointers[i]) if i < len(pointers) else self.tokens.size for i in (first, last)]
        return ends[0] // self.tokens.dtype.itemsize, ends[1] // self.tokens.dtype.itemsize

    def document_lengths(self, first: int, end: int) -> NDArray[np.int32]:
        """Tokens of some documents: of all sequences of each."""
        if self.index.sequences == self.index.num_documents:
            return np.array(self.index.lengths()[first:end])
        marks = np.array(self.index.document_marks()[first : end + 1])
        return np.add.reduceat(self.index.lengths()[marks[0] : marks[-1]], marks[:-1] - marks[0]).astype(np.int32)


def _open_shard(stem: Path, listed: Shard | None = None, dtype: str | None = None) -> _ShardFiles:
    """Opens ``stem``.bin and .idx, and checks that their sizes agree with each other and with the manifest."""
    bin_path, index_path, crc_path = (stem.with_name(f"{stem.name}.{suffix}") for suffix in ("bin", "idx", "crc"))
    for path in (bin_path, index_path, crc_path)[: 3 if listed else 2]:
        if not path.is_file():
            raise DataError(f"missing file of the data set: {path}. Copy or write the data set again")
    index = read_index(index_path)
    last_length, last_pointer = int(index.lengths()[-1]), int(index.pointers()[-1])
    expected, found = last_pointer + last_length * index.dtype.itemsize, bin_path.stat().st_size
    if found != expected or not found:
        raise DataError(f"{bin_path} has {found} bytes, expected {expected}: copy or write the data set again")
    files = _ShardFiles(TokenFile(bin_path, index.dtype, found, crc_path if listed else None), index)
    if listed is not None:
        has = files.tokens.num_tokens, index.num_documents, index.dtype.name
        for kind, is_, says in zip(
            ("tokens", "documents", "dtype"), has, (listed.tokens, listed.documents, dtype), strict=True
        ):
            if is_ != says:
                raise DataError(
                    f"{bin_path} and its index have {kind} {is_}, but {MANIFEST} expects {says}: "
                    "copy or write the data set again"
                )
    return files


def _no_folder(path: Path) -> str:
    """What to say where a data set is no folder."""
    if path.exists():
        return f"{path} is a file, not a data set, which is a folder of token shards. {_how_to_make(path)}"
    place = "" if path.is_absolute() else f" (looked for from {Path.cwd()})"
    return f"no data set at {path}: no such folder{place}. data_tools/tokenize_text.py makes one"


def _how_to_make(path: Path) -> str:
    command = f"python data_tools/tokenize_text.py --input {path} --tokenizer TOKENIZER --output FOLDER"
    return f"Make one by {command}, and name that FOLDER"


def _megatron_shards(folder: Path) -> list[_ShardFiles]:
    stems = sorted(path.with_suffix("") for path in folder.glob("*.idx"))
    if not stems:
        texts = [path for path in folder.rglob("*") if plain(path).suffix.lower() in DEFAULT_SUFFIXES]
        if texts:
            raise DataError(
                f"{folder} holds {summary(texts)}, not a data set, which is a folder of token shards. "
                f"{_how_to_make(folder)}"
            )
        raise DataError(
            f"no data set at {folder}: neither {MANIFEST} nor .bin/.idx files. An interrupted data_tools/"
            "tokenize_text.py leaves none: run it again"
        )
    warnings.warn(
        f"{folder} has no {MANIFEST}: read as Megatron shards {', '.join(stem.name for stem in stems)}; "
        "its vocabulary and tokenizer can't be checked",
        stacklevel=3,
    )
    shards = [_open_shard(stem) for stem in stems]
    if len(kinds := {shard.index.dtype.name for shard in shards}) > 1:
        raise DataError(f"the shards of {folder} have different types, {' and '.join(sorted(kinds))}: keep one kind")
    return shards


def _compare(path: Path, expected: str) -> None:
    if (found := _sha256(path)) != expected:
        raise DataError(f"{path} is damaged: SHA-256 {found}, expected {expected}. Copy or write it again")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sampled_sha256(file: TokenFile) -> str:
    """The SHA-256 of evenly spaced parts and of the size: a whole corpus would take hours to read at every start."""
    total = hashlib.sha256(str(file.size).encode())
    step = max(_SAMPLED_BYTES, (file.size - _SAMPLED_BYTES) // _MAX_SAMPLES)
    with open(file.path, "rb") as content:
        for begin in range(0, file.size, step):
            content.seek(begin)
            total.update(content.read(_SAMPLED_BYTES))
    return total.hexdigest()
