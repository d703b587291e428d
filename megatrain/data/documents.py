"""Text files, folders and JSON lines -> documents, one after the other, in an order that depends on nothing else."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatrain.data.errors import DataError

JSON_LINES = ".jsonl"
DEFAULT_SUFFIXES = (".txt", JSON_LINES)
BadPolicy = Literal["fail", "skip", "replace"]


@dataclass(frozen=True)
class Document:
    """``text``, never empty; ``origin``: file, or file:line; ``num_bytes`` of the input that it stands for."""

    text: str
    origin: str
    num_bytes: int


@dataclass
class DocumentReader:
    """Reads documents and keeps account of what it left out.

    Args:
        text_field: key of the text in JSON lines.
        bad: what invalid UTF-8 and broken JSON lines get. "fail": a DataError; "skip": left out; "replace":
            invalid characters become U+FFFD, broken JSON is left out.
    ``bad_records`` says "origin: reason" of each; ``num_empty`` counts documents without text.
    """

    text_field: str = "text"
    bad: BadPolicy = "fail"
    bad_records: list[str] = field(default_factory=list)
    num_empty: int = 0

    def read(self, files: Iterable[Path]) -> Iterator[Document]:
        """The documents of ``files``: .jsonl files hold one per line, all others are one each.

        Raises:
            DataError: a bad record under "fail" (names file and line), or a file that can't be read.
        """
        for path in files:
            try:
                yield from self._lines(path) if path.suffix == JSON_LINES else self._whole(path)
            except OSError as error:
                raise DataError(f"cannot read {path}: {error.strerror}") from error

    def _whole(self, path: Path) -> Iterator[Document]:
        content = path.read_bytes()
        yield from self._document(self._decode(content, str(path)), str(path), len(content))

    def _lines(self, path: Path) -> Iterator[Document]:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    origin = f"{path}:{number}"
                    yield from self._document(self._field_of(line, origin), origin, len(line))

    def _document(self, text: str | None, origin: str, num_bytes: int) -> Iterator[Document]:
        if text:
            yield Document(text, origin, num_bytes)
        elif text is not None:
            self.num_empty += 1

    def _field_of(self, line: bytes, origin: str) -> str | None:
        decoded = self._decode(line, origin)
        if decoded is None:
            return None
        try:
            record = json.loads(decoded)
        except (ValueError, RecursionError) as error:
            self._leave_out(origin, f"broken JSON: {error}")
            return None
        text = record.get(self.text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            self._leave_out(origin, f"no text under the key {self.text_field!r}")
            return None
        # JSON can spell half a surrogate pair ("\ud800"), which is no text in any encoding.
        return self._decode(text.encode("utf-8", "surrogatepass"), origin)

    def _decode(self, content: bytes, origin: str) -> str | None:
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            reason = f"invalid UTF-8 at byte {error.start}"
            if self.bad == "replace":
                self.bad_records.append(f"{origin}: {reason}")
                return content.decode(errors="replace")
            self._leave_out(origin, reason)
            return None

    def _leave_out(self, origin: str, reason: str) -> None:
        if self.bad == "fail":
            raise DataError(f"{origin}: {reason}. --bad skip leaves such records out, --bad replace repairs text")
        self.bad_records.append(f"{origin}: {reason}")


def find_files(inputs: Sequence[Path], suffixes: Sequence[str], exclude: Sequence[str] = ()) -> list[Path]:
    """The files to read: files as they are named, folders with all below that ends in one of ``suffixes``, sorted.

    Args:
        exclude: names of files and folders to leave out of folders.
    Raises:
        DataError: an input is not there, or nothing was found.
    """
    files = []
    for path in inputs:
        if path.is_dir():
            files += sorted(_below(path, tuple(suffixes), set(exclude)), key=lambda file: file.parts)
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"no such input: {path}")
    if not files:
        raise DataError(f"no files that end in {', '.join(suffixes)} below {', '.join(map(str, inputs))}: see --suffix")
    return files


def _below(folder: Path, suffixes: tuple[str, ...], exclude: set[str]) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = set(folders) - exclude  # os.walk goes into what is left in this list
        paths = (Path(place, name) for name in set(names) - exclude if name.endswith(suffixes))
        yield from (path for path in paths if path.is_file())


def digest_files(files: Iterable[Path]) -> str:
    """Names the content of ``files`` in their order: equal where the documents are, wherever the files stand."""
    total = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            kind = "lines" if path.suffix == JSON_LINES else "whole"
            total.update(f"{kind} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
