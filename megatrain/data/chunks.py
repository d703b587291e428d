"""Inputs -> chunks: about a MiB of whole records each, cut at places that depend on nothing but the inputs.

A text file larger than a chunk comes in pieces, each in a chunk of its own, so that memory does not depend on it.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import IO, NamedTuple

from megatrain.data.inputs import READ_ERRORS, STDIN, Source, read_errors

CHUNK_BYTES = 1 << 20
PIECE_BYTES = 1 << 20  # of one document that is encoded at a time
MAX_LINE_BYTES = 1 << 29
_MAX_PARTS = 10_000
_CUT_SEARCH = 1 << 16


class Position(NamedTuple):
    """A place between records: ``offset`` uncompressed bytes, ``record`` lines (tables: rows) into source ``file``."""

    file: int = 0
    offset: int = 0
    record: int = 0


class Part(NamedTuple):
    """Consecutive bytes of one source: lines, or (a piece of) one document.

    ``record``: number of the first line, or of the row, from 1; 0: the file itself is the document.
    ``problem``: why there is no content.
    """

    source: Source
    record: int
    content: bytes
    problem: str = ""


class Chunk(NamedTuple):
    """``parts`` in order, and where the next chunk begins.

    ``begins``, ``ends``: whether its first document begins, and its last one ends here. Where one does not, the
    chunk is a piece of one document.
    """

    number: int
    parts: list[Part]
    next: Position
    begins: bool = True
    ends: bool = True


def read_chunks(sources: Sequence[Source], start: Position = Position()) -> Iterator[Chunk]:  # noqa: B008, immutable
    """All chunks from ``start`` on, which is the ``next`` of a chunk that ends.

    Raises:
        DataError: an input can't be read.
    """
    parts: list[Part] = []
    size = number = 0
    for at in range(start.file, len(sources)):
        begin = start if at == start.file else Position(at)
        for piece in _read_source(sources[at], begin):
            if not (piece.begins and piece.ends) and parts:  # a piece of a large document stands alone
                yield Chunk(number, parts, Position(at))
                parts, size, number = [], 0, number + 1
            parts.append(piece.part)
            size += len(piece.part.content)
            if size >= CHUNK_BYTES or len(parts) >= _MAX_PARTS or not (piece.begins and piece.ends):
                yield Chunk(number, parts, piece.next, piece.begins, piece.ends)
                parts, size, number = [], 0, number + 1
    if parts:
        yield Chunk(number, parts, Position(len(sources)))


class _Piece(NamedTuple):
    part: Part
    next: Position
    begins: bool = True
    ends: bool = True


def _read_source(source: Source, start: Position) -> Iterator[_Piece]:
    try:
        if source.kind == "table":
            yield from _rows(source, start)
            return
        file = source.open()
        with closing(file):
            _skip(file, source, start.offset)
            yield from _text(file, source, start) if source.kind == "text" else _lines(file, source, start)
    except READ_ERRORS as error:
        raise read_errors(source.path, error) from error


def _skip(file: IO[bytes], source: Source, count: int) -> None:
    if source.path == STDIN:  # can't be seen twice: who resumes has read, and checked, what was read before
        return
    if file.seekable():
        file.seek(count)
        return
    while count and (block := file.read(min(count, CHUNK_BYTES))):
        count -= len(block)


def _lines(file: IO[bytes], source: Source, start: Position) -> Iterator[_Piece]:
    at, offset, record = start
    pending = bytearray()
    while block := file.read(CHUNK_BYTES):
        whole, newline, begun = block.rpartition(b"\n")
        pending += whole + newline
        if newline:
            content = bytes(pending)
            offset += len(content)
            num_lines = content.count(b"\n")
            yield _Piece(Part(source, record + 1, content), Position(at, offset, record + num_lines))
            record += num_lines
            pending.clear()
        pending += begun
        if len(pending) > MAX_LINE_BYTES:
            length = len(pending) + _read_over_line(file)
            offset, record = offset + length, record + 1
            problem = f"a line of {length} bytes (at most {MAX_LINE_BYTES} can be read)"
            yield _Piece(Part(source, record, b"", problem), Position(at, offset, record))
            pending.clear()
    if pending:
        yield _Piece(Part(source, record + 1, bytes(pending)), Position(at + 1))


def _read_over_line(file: IO[bytes]) -> int:
    length = 0
    while part := file.readline(CHUNK_BYTES):
        length += len(part)
        if part.endswith(b"\n"):
            break
    return length


def _text(file: IO[bytes], source: Source, start: Position) -> Iterator[_Piece]:
    following = Position(start.file + 1)
    content = file.read(PIECE_BYTES + _CUT_SEARCH)
    begins = True
    while len(content) == PIECE_BYTES + _CUT_SEARCH:
        cut = cut_before(content, PIECE_BYTES)
        yield _Piece(Part(source, 0, content[:cut]), following, begins, False)
        content = content[cut:] + file.read(cut)
        begins = False
    yield _Piece(Part(source, 0, content), following, begins, True)


def cut_before(text: bytes, begin: int) -> int:
    """Where to cut ``text`` at or after byte ``begin``: at a space between two ASCII letters, which all usual
    tokenizers keep apart; without one within 64 KiB, between two characters."""
    at = begin
    while (at := text.find(b" ", at, begin + _CUT_SEARCH)) >= 0:
        around = text[at - 1 : at] + text[at + 1 : at + 2]
        if len(around) == 2 and around.isalpha() and around.isascii():
            return at
        at += 1
    while 0xBF >= text[begin] >= 0x80 and begin > 0:
        begin -= 1
    return begin


def _rows(source: Source, start: Position) -> Iterator[_Piece]:
    from megatrain.data.tables import read_rows  # only where a table is read

    for row, content in read_rows(source.path, source.field, start.record):
        part = Part(source, row, content or b"", "no text (null)" if content is None else "")
        yield _Piece(part, Position(start.file, 0, row))
