"""Chunks of input -> documents: decoded, taken out of their JSON, the bad ones told apart."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from megatrain.data.corpus.chunks import Chunk, SourceBytes, read_chunks
from megatrain.data.corpus.inputs import Source
from megatrain.data.errors import DataError

try:
    import orjson
except ImportError:
    orjson = None  # type: ignore[assignment]

BadPolicy = Literal["fail", "skip", "replace"]
EmptyPolicy = Literal["fail", "skip"]
_KEYS_SHOWN = 12
_KINDS = {bool: "true or false", list: "a list", dict: "an object"}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Document(NamedTuple):
    """``text``, never empty but in a piece; ``origin``: file, file:line or file:row."""

    text: str
    origin: str


class BadRecord(Exception):
    """A record that is no document; the text says why."""


@dataclass
class RecordReader:
    """Takes documents out of chunks and keeps account of what it left out or repaired.

    Args:
        bad: what invalid UTF-8, broken JSON and values that are no text get. "fail": a DataError; "skip": left out;
            "replace": invalid characters become U+FFFD, the others are left out.
        empty: what documents without a character get.
    ``problems`` says "origin: reason" of each such record.
    """

    bad: BadPolicy = "fail"
    empty: EmptyPolicy = "skip"
    problems: list[str] = field(default_factory=list)

    def read(self, chunk: Chunk) -> list[Document]:
        """The documents of a chunk. A bad piece of a large document gives none.

        Raises:
            DataError: a bad record under "fail" (names file and line).
        """
        return [document for part in chunk.parts for document in self._part(part, chunk.begins)]

    def read_all(self, sources: Sequence[Source]) -> Iterator[Document]:
        """All documents of ``sources``, each whole."""
        pieces: list[Document] = []
        bad = False
        for chunk in read_chunks(sources):
            documents = self.read(chunk)
            if chunk.begins and chunk.ends:
                yield from documents
                continue
            pieces, bad = ([], False) if chunk.begins else (pieces, bad)
            pieces += documents
            bad = bad or not documents
            if chunk.ends and not bad:
                yield Document("".join(piece.text for piece in pieces), pieces[0].origin)

    def _part(self, part: SourceBytes, begins: bool) -> Iterator[Document]:
        source, content = part.source, part.content
        if begins and part.record <= 1 and source.kind != "table":
            content = content.removeprefix(BYTE_ORDER_MARK)
        if part.problem or source.kind in ("text", "table"):
            origin = f"{source.path}:{part.record}" if part.record else str(source.path)
            if part.problem:
                self._leave_out(origin, part.problem)
            else:
                yield from self._document(content, origin)
            return
        for number, line in enumerate(content.split(b"\n"), part.record):
            if line.strip():
                origin = f"{source.path}:{number}"
                if source.kind == "jsonl":
                    yield from self._json(line, origin, source.field)
                else:
                    yield from self._document(line.removesuffix(b"\r"), origin)

    def _json(self, line: bytes, origin: str, field: str) -> Iterator[Document]:
        try:
            record = _parse_quickly(line)
            if record is None:
                decoded = self._decode(line, origin)
                if decoded is None:
                    return
                record = parse_json(decoded)
            text = text_under(record, field)
        except BadRecord as error:
            self._leave_out(origin, str(error))
            return
        # JSON can spell half a surrogate pair ("\ud800"), which is no text in any encoding.
        yield from self._document(text if text.isascii() else text.encode("utf-8", "surrogatepass"), origin)

    def _document(self, content: bytes | str, origin: str) -> Iterator[Document]:
        if text := content if isinstance(content, str) else self._decode(content, origin):
            yield Document(text, origin)
        elif text is not None:
            self._leave_out_empty(origin)

    def _decode(self, content: bytes, origin: str) -> str | None:
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            reason = f"invalid UTF-8 at byte {error.start}"
            if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
                reason += " (UTF-16? iconv -f UTF-16 -t UTF-8 changes it)"
            if self.bad == "replace":
                self.problems.append(f"{origin}: {reason}, replaced")
                return content.decode(errors="replace")
            self._leave_out(origin, reason)
            return None

    def _leave_out(self, origin: str, reason: str) -> None:
        if self.bad == "fail":
            raise DataError(f"{origin}: {reason}. --bad skip leaves such records out, --bad replace repairs text")
        self.problems.append(f"{origin}: {reason}, left out")

    def _leave_out_empty(self, origin: str) -> None:
        if self.empty == "fail":
            raise DataError(f"{origin}: an empty document. --empty skip leaves such records out")
        self.problems.append(f"{origin}: empty, left out")


def _parse_quickly(line: bytes) -> Any:
    """The value of one JSON line by orjson; None where that is not installed, or finds a fault: ``json`` names it."""
    try:
        return orjson and orjson.loads(line)
    except ValueError:
        return None


def parse_json(line: str | bytes) -> Any:
    """The value of one JSON line.

    Raises:
        BadRecord: it is none.
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"broken JSON: {error}") from error


def text_under(record: Any, key: str) -> str:
    """The text under ``key`` of a JSON object; "a.b" also means key b of the object under a.

    Raises:
        BadRecord: there is none.
    """
    value = record.get(key) if isinstance(record, dict) else None
    if value is None and "." in key:
        value = record
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
    if isinstance(value, str):
        return value
    if not isinstance(record, dict):
        raise BadRecord(f"no text under the key {key!r}: the line holds no object {{…}}")
    keys = ", ".join(list(record)[:_KEYS_SHOWN]) + (", …" if len(record) > _KEYS_SHOWN else "")
    found = f"there are {keys or 'none'}" if value is None else f"it holds {_KINDS.get(type(value), 'a number')}"
    raise BadRecord(f"no text under the key {key!r}: {found}")
