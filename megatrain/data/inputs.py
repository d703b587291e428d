"""Which files are read, what kind each is, and its bytes: plain, gzip, zstd or xz, or standard input."""

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

from megatrain.data.errors import DataError

Kind = Literal["text", "lines", "jsonl", "table"]
STDIN = Path("-")
COMPRESSED = (".gz", ".zst", ".xz")
_KINDS: dict[str, Kind] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "table",
    ".arrow": "table",
}
DEFAULT_SUFFIXES = (".txt", ".jsonl", ".ndjson", ".parquet", ".arrow")
_READ_BYTES = 1 << 20


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
            DataError: a decompressor that is not installed.
        """
        if self.path == STDIN:
            return sys.stdin.buffer
        if self.path.suffix == ".gz":
            return gzip.open(self.path)  # type: ignore[return-value]
        if self.path.suffix == ".xz":
            return lzma.open(self.path)
        if self.path.suffix == ".zst":
            return io.BufferedReader(_ZstdFile(self.path), _READ_BYTES)
        return open(self.path, "rb")


class _ZstdFile(io.RawIOBase):
    """Uncompressed zstd frames; unlike the library's own stream, a frame that is cut short is an error."""

    def __init__(self, path: Path):
        try:
            import zstandard
        except ImportError as error:
            raise DataError(f"{path}: reading zstd needs the package zstandard (pip install zstandard)") from error
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
) -> list[Source]:
    """The files to read: files as they are named, folders with all below that ends in one of ``suffixes``, sorted.

    A suffix also stands for its compressed forms. A folder that the ``datasets`` library saved gives its data files.

    Args:
        exclude: names of files and folders to leave out of folders.
        kind: what every file holds; None: what its suffix says, and standard input holds JSON lines.
        field: key or column of the text.
    Raises:
        DataError: an input is not there, or nothing was found.
    """
    files: list[Path] = []
    for path in inputs:
        if path == STDIN or path.is_file() or path.is_fifo():
            files.append(path)
        elif path.is_dir():
            files += sorted(_below(path, tuple(suffixes), set(exclude)), key=lambda file: file.parts)
        else:
            raise DataError(f"no such input: {path}")
    if not files:
        raise DataError(f"no files that end in {', '.join(suffixes)} below {', '.join(map(str, inputs))}: see --suffix")
    if files.count(STDIN) > 1:
        raise DataError("standard input (-) can be read once only")
    return [Source(path, kind or _kind_of(path), field) for path in files]


def _kind_of(path: Path) -> Kind:
    return "jsonl" if path == STDIN else _KINDS.get(_plain(path).suffix, "text")


def _plain(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in COMPRESSED else path


def _below(folder: Path, suffixes: tuple[str, ...], exclude: set[str]) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        here = Path(place)
        if "dataset_dict.json" in names:
            raise DataError(f"{here} holds several splits: name one of them, as in {here / sorted(folders)[0]}")
        if {"state.json", "dataset_info.json"} <= set(names):
            yield from _saved_dataset(here)
            folders[:] = []
            continue
        folders[:] = set(folders) - exclude  # os.walk goes into what is left in this list
        for name in set(names) - exclude:
            if _plain(Path(name)).name.endswith(suffixes) and (here / name).is_file():
                yield here / name


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
