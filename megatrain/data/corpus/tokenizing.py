"""Inputs -> data sets: chunks go out to a pool, their tokens come back in order and are written.

What has been done is noted now and then; a run that was killed goes on at the last note.
"""

import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm  # type: ignore[import-untyped]

from megatrain.data.corpus.chunks import Chunk, Position, read_chunks
from megatrain.data.corpus.encode import Encoded, EncoderSpec, encode_chunk, encoder_of
from megatrain.data.corpus.inputs import STDIN, Source
from megatrain.data.errors import DataError
from megatrain.data.file_names import plain
from megatrain.data.pool import Pool
from megatrain.data.shards.manifest import MANIFEST, Manifest
from megatrain.data.shards.writer import BAD_RECORDS, DatasetWriter, partial_of
from megatrain.disk.durable import write_durably

_SECONDS_BETWEEN_NOTES = 20
_NO_STDIN = {"stdin_sha256": None}


class Output(NamedTuple):
    """One data set to write, and what its content is a function of."""

    folder: Path
    made_from: dict[str, Any]

    def is_written(self) -> bool:
        """Whether it is there. (What came from standard input is for the caller to tell.)

        Raises:
            DataError: the manifest there can't be read.
        """
        if not (self.folder / MANIFEST).is_file():
            return False
        return {**Manifest.read(self.folder).made_from, **_NO_STDIN} == {**self.made_from, **_NO_STDIN}


def note_path(folder: Path) -> Path:
    """Where a run notes how far it is."""
    return folder.absolute().with_name(f".{folder.absolute().name}.progress.json")


@dataclass
class ProblemLog:
    """The list of bad records, in a file."""

    path: Path
    count: int = 0
    sha256: Any = field(default_factory=hashlib.sha256)

    def resume(self, state: dict[str, int]) -> None:
        """Goes on after the first ``state["bytes"]``."""
        self.count = state["count"]
        if self.count:
            os.truncate(self.path, state["bytes"])
            self.sha256.update(self.path.read_bytes())

    def add(self, problems: Sequence[str]) -> None:
        """Appends lines."""
        if problems:
            lines = "".join(f"{json.dumps(problem, ensure_ascii=False)[1:-1]}\n" for problem in problems).encode()
            with open(self.path, "ab" if self.count else "wb") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
            self.count += len(problems)
            self.sha256.update(lines)

    def state(self) -> dict[str, int]:
        """What ``resume`` needs to go on from here."""
        return {"count": self.count, "bytes": self.path.stat().st_size if self.count else 0}

    def first(self, count: int) -> list[str]:
        """The first lines."""
        if not self.count:
            return []
        with open(self.path, encoding="utf-8") as file:
            return [line.rstrip("\n") for _, line in zip(range(count), file, strict=False)]


class TokenizeRun:
    """One run over all inputs.

    Args:
        outputs: the data set, and as a second one that of held-out documents.
        shard_tokens: tokens that fill a shard.
        lineage: what the manifests say about where the data comes from; counts are added.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        spec: EncoderSpec,
        outputs: Sequence[Output],
        tokenizer_json: bytes,
        shard_tokens: int,
        lineage: dict[str, Any],
    ):
        self.sources = sources
        self.spec = spec
        self.outputs = outputs
        self.lineage = lineage
        self.manifests: list[Manifest] = []
        self.first_problems: list[str] = []
        self.num_problems = 0
        self.text_bytes = 0  # of all documents in UTF-8, whatever the files are compressed by
        self._tokenizer_json = tokenizer_json
        self._shard_tokens = shard_tokens
        self._note_path = note_path(outputs[0].folder)
        self._problems = ProblemLog(partial_of(outputs[0].folder) / BAD_RECORDS)
        self._stdin_sha256 = hashlib.sha256()
        self._held_out = self._dropped = False  # of the document that has begun and not ended

    def run(self, pool: Pool) -> None:
        """Writes the data sets.

        Raises:
            DataError: bad input, or other files in the way.
        """
        note = self._read_note()
        with ExitStack() as stack:
            self._writers = [
                None if note and self._is_finished(output, note) else stack.enter_context(self._writer(number, note))
                for number, output in enumerate(self.outputs)
            ]
            try:
                self._write_all(pool, self._resume(note) if note else Position())
                self._finish()
            except DataError:
                self._note_path.unlink(missing_ok=True)
                raise
        self._note_path.unlink(missing_ok=True)

    def _resume(self, note: dict[str, Any]) -> Position:
        position = Position(*note["position"])
        self._problems.resume(note["problems"])
        self.text_bytes = note["text_bytes"]
        self._read_over_stdin(position, note["stdin_sha256"])
        at = "the end"
        if position.file < len(self.sources):
            at = f"{self.sources[position.file].path}, byte {position.offset}, record {position.record}"
        print(f"an earlier run was stopped: going on from {at}", file=sys.stderr)
        return position

    def _writer(self, number: int, note: dict[str, Any] | None) -> DatasetWriter:
        encoder = encoder_of(self.spec)
        return DatasetWriter(
            self.outputs[number].folder,
            tokenizer=self._tokenizer_json,
            tokenizer_name=self.spec.tokenizer.name,
            vocab_size=encoder.vocab_size,
            eod_id=encoder.eod_id,
            shard_tokens=self._shard_tokens,
            made_from=self.outputs[number].made_from,
            resume=note["writers"][number] if note else None,
        )

    def _write_all(self, pool: Pool, position: Position) -> None:
        num_bytes = [source.num_bytes for source in self.sources]
        total = sum(filter(None, num_bytes)) if None not in num_bytes else None
        noted_shards, noted_at = self._num_shards(), time.monotonic()
        # on a terminal only: a log file has no use for a bar
        with tqdm(total=total, unit="B", unit_scale=True, desc="tokenize", disable=None) as bar:
            bar.update(sum(size or 0 for size in num_bytes[: position.file]) + position.offset)
            chunks = read_chunks(self.sources, position, encoder_of(self.spec).cutter.find_in_bytes)
            for chunk, encoded in pool.ordered(functools.partial(encode_chunk, self.spec), chunks):
                self._add(chunk, encoded)
                bar.update(
                    sum(len(part.content) for part in chunk.parts if plain(part.source.path) == part.source.path)
                )
                if not chunk.ends:
                    continue
                due = time.monotonic() > noted_at + _SECONDS_BETWEEN_NOTES
                if due or self._num_shards() != noted_shards:
                    self._note(chunk.next)
                    noted_shards, noted_at = self._num_shards(), time.monotonic()

    def _add(self, chunk: Chunk, encoded: Encoded) -> None:
        self._problems.add(encoded.problems)
        self.text_bytes += encoded.text_bytes
        for part in chunk.parts:
            if part.source.path == STDIN:
                self._stdin_sha256.update(part.content)
        if not (chunk.begins and chunk.ends):
            self._add_piece(chunk, encoded)
        elif encoded.held_out.any():
            of_token = encoded.held_out.repeat(encoded.lengths)
            for writer, wanted, tokens in ((0, ~encoded.held_out, ~of_token), (1, encoded.held_out, of_token)):
                self._open_writer(writer).add_many(encoded.ids[tokens], encoded.lengths[wanted])
        else:
            self._open_writer(0).add_many(encoded.ids, encoded.lengths)

    def _add_piece(self, chunk: Chunk, encoded: Encoded) -> None:
        if chunk.begins:
            self._held_out, self._dropped = bool(encoded.held_out.any()), False
        writer = self._open_writer(int(self._held_out))
        if self._dropped:
            return
        if not len(encoded.lengths):
            writer.drop_pieces()
            self._dropped = True
            return
        writer.add_piece(encoded.ids, ends=chunk.ends)

    def _open_writer(self, number: int) -> DatasetWriter:
        writer = self._writers[number]
        assert writer is not None  # finished ones get no more documents: the note says that all input is read
        return writer

    def _num_shards(self) -> int:
        return sum(writer.num_shards for writer in self._writers if writer)

    def _note(self, position: Position) -> None:
        content = {
            "made_from": [output.made_from for output in self.outputs],
            "position": position,
            "writers": [writer and writer.checkpoint() for writer in self._writers],
            "problems": self._problems.state(),
            "text_bytes": self.text_bytes,
            "stdin_sha256": self._stdin_sha256.hexdigest(),
        }
        write_durably(self._note_path, json.dumps(content).encode())

    def _read_note(self) -> dict[str, Any] | None:
        try:
            note: dict[str, Any] = json.loads(self._note_path.read_bytes())
        except FileNotFoundError:
            return None
        # what it belongs to may have been removed, or made from something else
        same = note["made_from"] == [output.made_from for output in self.outputs]
        there = all(self._is_finished(o, note) or partial_of(o.folder).is_dir() for o in self.outputs)
        return note if same and there else None

    def _is_finished(self, output: Output, note: dict[str, Any]) -> bool:
        """Whether the run was killed after this output got its name."""
        return Position(*note["position"]).file == len(self.sources) and output.is_written()

    def _read_over_stdin(self, position: Position, sha256: str) -> None:
        if position.file == len(self.sources) or self.sources[position.file].path != STDIN:
            return
        left = position.offset
        while left and (block := sys.stdin.buffer.read(min(left, 1 << 20))):
            self._stdin_sha256.update(block)
            left -= len(block)
        if self._stdin_sha256.hexdigest() != sha256:
            raise DataError(
                "standard input differs from that of the run that was interrupted; to start anew, remove "
                f"{self._note_path}"
            )

    def _finish(self) -> None:
        self.num_problems, self.first_problems = self._problems.count, self._problems.first(10)
        for writer in self._writers:
            if writer is not None:
                writer.close_shard()
                if not writer.num_shards:
                    self._refuse_empty(writer)  # before the other data set comes into being
        self._note(Position(len(self.sources)))
        bad_records = self._problems.sha256.hexdigest() if self._problems.count else ""
        # the held-out documents first: the note and the list of bad records stand with the others
        for number, writer in reversed(list(enumerate(self._writers))):
            if writer is not None:
                writer.made_from = {**writer.made_from, **self._stdin_digest()}
                lineage = {**self.lineage, "bad_records": self._problems.count}
                writer.finish(lineage, bad_records if number == 0 else "")
        self.manifests = [Manifest.read(output.folder) for output in self.outputs]

    def _refuse_empty(self, writer: DatasetWriter) -> None:
        try:
            writer.finish()  # says that there are no documents
        except DataError as error:
            if not self.first_problems:
                raise
            raise DataError(f"{error}; {self.num_problems} left out, as {self.first_problems[0]}") from error

    def _stdin_digest(self) -> dict[str, str]:
        has_stdin = any(source.path == STDIN for source in self.sources)
        return {"stdin_sha256": self._stdin_sha256.hexdigest()} if has_stdin else {}
