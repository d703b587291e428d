"""Which files are read, what kind each is, and its bytes: plain, gzip, bzip2, zstd or xz, or standard input."""

import bz2
import concurrent.futures
import gzip
import hashlib
import io
import json
import lzma
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from megatrain.config.extras import missing
from megatrain.data.errors import DataError
from megatrain.data.file_names import DEFAULT_SUFFIXES, plain, summary

Kind = Literal["text", "lines", "jsonl", "table"]
STDIN = Path("-")
_KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "table",
    ".arrow": "table",
}
_READ_BYTES = 1 << 20
_LISTED = 10  # of the files that are left out
# how files begin whose bytes are no text
_NO_TEXT = {
    b"\x1f\x8b": "gzip data: name it .gz",
    b"BZh": "bzip2 data: name it .bz2",
    b"\x28\xb5\x2f\xfd": "zstd data: name it .zst",
    b"\xfd7zXZ": "xz data: name it .xz",
    b"PK\x03\x04": "a zip archive (or an office document): unpack it",
    b"PAR1": "a Parquet table: name it .parquet, or read it by --format table",
    b"ARROW1": "an Arrow table: name it .arrow, or read it by --format table",
    b"%PDF": "a PDF document: take its text out first",
}


@dataclass(frozen=True)
class Source:
    """One input.

    ``kind``: "text" is one document; "lines" and "jsonl" hold one a line; "table" one a row. ``field``: key of the
    text in JSON lines, column of a table.
    """

    path: Path
    kind: Kind
    field: str = "text"

    @property
    def num_bytes(self) -> int | None:
        """Its size on disk; None: not known (standard input)."""
        return None if self.path == STDIN else self.path.stat().st_size

    def open(self) -> IO[bytes]:
        """The uncompressed bytes.

        Raises:
            DataError: a decompressor that is not installed, or bytes that begin as no text does.
        """
        if self.path == STDIN:
            return sys.stdin.buffer
        file = self._opened()
        begin = file.peek(8)  # type: ignore[attr-defined]
        if reason := next((reason for magic, reason in _NO_TEXT.items() if begin.startswith(magic)), None):
            file.close()
            raise DataError(f"{self.path} is {reason}")
        return file

    def _opened(self) -> IO[bytes]:
        ending = self.path.suffix.lower()
        if ending == ".gz":
            return gzip.open(self.path)  # type: ignore[return-value]
        if ending == ".bz2":
            return bz2.open(self.path)
        if ending == ".xz":
            return lzma.open(self.path)
        if ending == ".zst":
            return io.BufferedReader(_ZstdFile(self.path), _READ_BYTES)
        return open(self.path, "rb")


class _ZstdFile(io.RawIOBase):
    """Uncompressed zstd frames; unlike the library's own stream, a frame that is cut short is an error."""

    def __init__(self, path: Path):
        try:
            import zstandard
        except ImportError as error:
            raise DataError(missing("zstandard", f"reading {path}", error)) from error
        self._new = zstandard.ZstdDecompressor
        self._error = zstandard.ZstdError
        self._file = open(path, "rb")  # noqa: SIM115, closed by close()
        self._frame: Any = None
        self._compressed = self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._compressed = self._compressed or self._file.read(1 << 16)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the last zstd frame is cut short")
                return 0
            self._frame = self._frame or self._new().decompressobj()
            try:
                self._ready = self._frame.decompress(self._compressed)
            except self._error as error:
                raise OSError(f"not zstd data: {error}") from error
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def read_errors(path: Path, error: Exception) -> DataError:
    """What a failure to read ``path`` is called."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return DataError(f"cannot read {path}: {reason}")


READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)


def find_sources(
    inputs: Sequence[Path],
    suffixes: Sequence[str] = DEFAULT_SUFFIXES,
    exclude: Sequence[str] = (),
    kind: Kind | None = None,
    field: str = "text",
    left_out: list[Path] | None = None,
) -> list[Source]:
    """The files to read: files as they are named, folders with all below that ends in one of ``suffixes``, sorted.

    A suffix also stands for its compressed forms, and for capital letters. A folder that the ``datasets`` library saved
    gives its data files.

    Args:
        exclude: names of files and folders to leave out of folders.
        kind: what every file holds; None: what its suffix says, and standard input holds JSON lines.
        field: key or column of the text.
        left_out: gets what folders hold besides: files that end otherwise, and links to folders.
    Raises:
        DataError: an input is not there, or nothing was found.
    """
    files: list[Path] = []
    others: list[Path] = []
    for path in inputs:
        if path == STDIN or path.is_file() or path.is_fifo():
            files.append(path)
        elif path.is_dir():
            files += sorted(
                _below(path, tuple(suffix.lower() for suffix in suffixes), set(exclude), others),
                key=lambda file: file.parts,
            )
        else:
            raise DataError(f"no such input: {path}")
    if not files:
        raise DataError(
            f"no files that end in {', '.join(suffixes)} below {', '.join(map(str, inputs))}: see --suffix"
            f"{'; left out: ' + summary(others) if others else ''}"
        )
    if left_out is not None:
        left_out += others
    if files.count(STDIN) > 1:
        raise DataError("standard input (-) can be read once only")
    return [Source(path, kind or _kind_of(path), field) for path in files]


def _kind_of(path: Path) -> Kind:
    return "jsonl" if path == STDIN else _KINDS.get(plain(path).suffix.lower(), "text")


def left_out_lines(left_out: Sequence[Path], why: str) -> list[str]:
    """What a tool says of files that it does not read, counted and, the first of them, listed."""
    if not left_out:
        return []
    first = sorted(left_out, key=lambda path: path.parts)[:_LISTED]
    more = [f"  … and {len(left_out) - _LISTED} more"] if len(left_out) > _LISTED else []
    return [f"{len(left_out)} files left out ({summary(left_out)}): {why}", *(f"  {path}" for path in first), *more]


def _below(folder: Path, suffixes: tuple[str, ...], exclude: set[str], others: list[Path]) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        here = Path(place)
        if "dataset_dict.json" in names:
            raise DataError(f"{here} holds several splits: name one of them, as in {here / sorted(folders)[0]}")
        if {"state.json", "dataset_info.json"} <= set(names):
            yield from _saved_dataset(here)
            folders[:] = []
            continue
        folders[:] = set(folders) - exclude  # os.walk goes into what is left in this list
        others += (here / name for name in folders if (here / name).is_symlink())  # which os.walk does not follow
        for name in set(names) - exclude:
            if plain(Path(name)).name.lower().endswith(suffixes) and (here / name).is_file():
                yield here / name
            else:
                others.append(here / name)


def _saved_dataset(folder: Path) -> Iterator[Path]:
    """The data files that ``datasets.Dataset.save_to_disk`` wrote."""
    try:
        listed = json.loads((folder / "state.json").read_bytes())["_data_files"]
        yield from (folder / file["filename"] for file in listed)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / 'state.json'} is not what datasets.save_to_disk writes: {error!r}") from error


@dataclass(frozen=True)
class InputDigest:
    """The content of one input."""

    path: str
    kind: Kind
    num_bytes: int
    sha256: str


def digest_sources(sources: Iterable[Source]) -> list[InputDigest]:
    """Digests of the files, as they are on disk; those of standard input are empty."""

    def digest(source: Source) -> InputDigest:
        if source.num_bytes is None:
            return InputDigest(str(source.path), source.kind, 0, "")
        with open(source.path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return InputDigest(str(source.path), source.kind, source.num_bytes, sha256)

    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        return list(threads.map(digest, sources))


def digest_of_all(digests: Iterable[InputDigest]) -> str:
    """Names the content of all inputs in their order: equal where the documents are, wherever the files stand."""
    return hashlib.sha256("".join(f"{digest.kind} {digest.sha256}\n" for digest in digests).encode()).hexdigest()
