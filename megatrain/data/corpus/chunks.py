"""Inputs -> chunks: about a MiB of whole records each, cut at places that depend on nothing but the inputs.

A text file larger than a chunk comes in pieces, each in a chunk of its own, so that memory does not depend on it. Where
it may be cut is for the caller to say: for tokens, that depends on the tokenizer (megatrain/data/corpus/cuts.py).
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import IO, NamedTuple

from megatrain.data.corpus.inputs import READ_ERRORS, STDIN, Source, read_errors
from megatrain.data.errors import DataError
from megatrain.data.file_names import plain

CHUNK_BYTES = 1 << 20
PIECE_BYTES = 1 << 20  # of one document that is encoded at a time
MAX_PIECE_BYTES = 1 << 26  # of text in which there is no place to cut
MAX_LINE_BYTES = 1 << 29
_MAX_PARTS = 10_000
_CUT_SEARCH = 1 << 16
_WORD_END = re.compile(rb"(?<=[^\s])\s")

# (bytes of a text, byte to begin at) -> the byte to cut before; -1: none
FindCut = Callable[[bytes, int], int]


class Position(NamedTuple):
    """A place between records: ``offset`` uncompressed bytes, ``record`` lines (tables: rows) into source ``file``."""

    file: int = 0
    offset: int = 0
    record: int = 0


class SourceBytes(NamedTuple):
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
    chunk is a piece of one document. ``before``: the character before a piece that goes on.
    """

    number: int
    parts: list[SourceBytes]
    next: Position
    begins: bool = True
    ends: bool = True
    before: str = ""


def cut_anywhere(content: bytes, begin: int) -> int:
    """A cut for pieces that are put together again: after a word, else between two characters."""
    if found := _WORD_END.search(content, begin, begin + _CUT_SEARCH):
        return found.start()
    while begin > 0 and 0xBF >= content[begin] >= 0x80:
        begin -= 1
    return begin


def read_chunks(
    sources: Sequence[Source],
    start: Position = Position(),  # noqa: B008, immutable
    find_cut: FindCut = cut_anywhere,
) -> Iterator[Chunk]:
    """All chunks from ``start`` on, which is the ``next`` of a chunk that ends.

    Args:
        find_cut: where a text file of more than ``PIECE_BYTES`` may be cut.
    Raises:
        DataError: an input can't be read.
    """
    parts: list[SourceBytes] = []
    size = number = 0
    for at in range(start.file, len(sources)):
        begin = start if at == start.file else Position(at)
        for piece in _read_source(sources[at], begin, find_cut):
            if not (piece.begins and piece.ends) and parts:  # a piece of a large document stands alone
                yield Chunk(number, parts, Position(at))
                parts, size, number = [], 0, number + 1
            parts.append(piece.part)
            size += len(piece.part.content)
            if size >= CHUNK_BYTES or len(parts) >= _MAX_PARTS or not (piece.begins and piece.ends):
                yield Chunk(number, parts, piece.next, piece.begins, piece.ends, piece.before)
                parts, size, number = [], 0, number + 1
    if parts:
        yield Chunk(number, parts, Position(len(sources)))


class _Piece(NamedTuple):
    part: SourceBytes
    next: Position
    begins: bool = True
    ends: bool = True
    before: str = ""


def _read_source(source: Source, start: Position, find_cut: FindCut) -> Iterator[_Piece]:
    try:
        if source.kind == "table":
            yield from _rows(source, start)
            return
        file = source.open()
        with closing(file):
            _skip(file, source, start.offset)
            yield from _text(file, source, start, find_cut) if source.kind == "text" else _lines(file, source, start)
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
    if source.kind == "jsonl":
        refuse_array(file, source)
    while block := file.read(CHUNK_BYTES):
        whole, newline, begun = block.rpartition(b"\n")
        pending += whole + newline
        if newline:
            content = bytes(pending)
            offset += len(content)
            num_lines = content.count(b"\n")
            yield _Piece(SourceBytes(source, record + 1, content), Position(at, offset, record + num_lines))
            record += num_lines
            pending.clear()
        pending += begun
        if len(pending) > MAX_LINE_BYTES:
            length = len(pending) + _read_over_line(file)
            offset, record = offset + length, record + 1
            problem = f"a line of {length} bytes (at most {MAX_LINE_BYTES} can be read)"
            yield _Piece(SourceBytes(source, record, b"", problem), Position(at, offset, record))
            pending.clear()
    if pending:
        yield _Piece(SourceBytes(source, record + 1, bytes(pending)), Position(at + 1))


def refuse_array(file: IO[bytes], source: Source) -> None:
    """Refuses a .json file that is one array: as JSON lines it would be many broken records.

    Raises:
        DataError: it is one; says how to change it.
    """
    is_json = plain(source.path).suffix.lower() == ".json"
    if is_json and file.peek(64)[:64].removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":  # type: ignore[attr-defined]
        raise DataError(
            f"{source.path} is one JSON array, not JSON lines, which have a document a line: change it by "
            f"jq -c '.[]' {source.path} > {plain(source.path).with_suffix('.jsonl')}"
        )


def _read_over_line(file: IO[bytes]) -> int:
    length = 0
    while part := file.readline(CHUNK_BYTES):
        length += len(part)
        if part.endswith(b"\n"):
            break
    return length


def _text(file: IO[bytes], source: Source, start: Position, find_cut: FindCut) -> Iterator[_Piece]:
    following = Position(start.file + 1)
    content = file.read(PIECE_BYTES + _CUT_SEARCH)
    begins, before, searched = True, "", PIECE_BYTES
    while len(content) >= PIECE_BYTES + _CUT_SEARCH:
        cut = find_cut(content, searched)
        held = len(content) if cut < 0 else cut
        if held > MAX_PIECE_BYTES:
            yield _Piece(SourceBytes(source, 0, b"", no_cut_within(held)), following, begins, True)
            return
        if cut < 0:  # held together until there is a place, or the end
            searched = len(content) - 4  # a character that is not whole yet was not seen
            if not (more := file.read(len(content))):
                break
            content += more
            continue
        yield _Piece(SourceBytes(source, 0, content[:cut]), following, begins, False, before)
        before = content[max(0, cut - 4) : cut].decode(errors="ignore")[-1:]
        content = content[cut:] + file.read(cut)
        begins, searched = False, PIECE_BYTES
    yield _Piece(SourceBytes(source, 0, content), following, begins, True, before)


def no_cut_within(num_bytes: int) -> str:
    """Why a text can't be encoded: it has no place to cut, and is too long to be encoded as one."""
    return (
        f"{num_bytes} bytes without a place where this tokenizer's words surely end (at most {MAX_PIECE_BYTES} are "
        "encoded together): break the text into several documents"
    )


def _rows(source: Source, start: Position) -> Iterator[_Piece]:
    from megatrain.data.corpus.tables import read_rows  # only where a table is read

    for row, content in read_rows(source.path, source.field, start.record):
        part = SourceBytes(source, row, content or b"", "no text (null)" if content is None else "")
        yield _Piece(part, Position(start.file, 0, row))
