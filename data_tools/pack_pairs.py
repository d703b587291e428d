"""Sentence pairs -> two data sets, OUTPUT/source and OUTPUT/target, whose documents belong together by number.

Reads JSON lines or tables that hold both texts, or two text files of one sentence a line.
"""

import argparse
import hashlib
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megatrain.console import run_tool
from megatrain.data.corpus.chunks import refuse_array
from megatrain.data.corpus.console import lineage_of
from megatrain.data.corpus.documents import BYTE_ORDER_MARK, BadRecord, parse_json, text_under
from megatrain.data.corpus.encode import Encoder
from megatrain.data.corpus.inputs import READ_ERRORS, Source, digest_of_all, digest_sources, find_sources, read_errors
from megatrain.data.corpus.tables import read_rows
from megatrain.data.corpus.tokenizer_files import load_tokenizer
from megatrain.data.errors import DataError
from megatrain.data.shards.writer import DatasetWriter
from megatrain.disk.durable import write_durably
from megatrain.disk.target import require_free

PAIRS = "pairs.json"
_BATCH = 2000
_PROBLEMS_SHOWN = 10


class Pair(NamedTuple):
    """Two texts that belong together."""

    source: str
    target: str


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit code: 0, or 2 after an error message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input",
        nargs="+",
        type=Path,
        default=[],
        help=".jsonl, .parquet or .arrow files with both texts, .jsonl also compressed",
    )
    parser.add_argument("--source-field", default="source", help="key of the source (default: %(default)s)")
    parser.add_argument("--target-field", default="target", help="key of the target (default: %(default)s)")
    parser.add_argument("--source", type=Path, help="a text file of a source a line, instead of --input")
    parser.add_argument("--target", type=Path, help="the text file of its targets")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer of both, any kind of file")
    parser.add_argument("--eod", help="token at the end of each text (default: the usual one of the tokenizer)")
    parser.add_argument("--max-source-tokens", type=int, default=1024, help="longer pairs go (default: %(default)s)")
    parser.add_argument("--max-target-tokens", type=int, default=1024, help="longer pairs go (default: %(default)s)")
    parser.add_argument("--bad", choices=["fail", "skip"], default="fail", help="what broken and empty pairs get")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens that fill a shard")
    parser.add_argument("--output", type=Path, required=True, help="folder for both")
    parser.add_argument("--overwrite", action="store_true", help="replace older data sets")
    return run_tool(parser, pack, argv)


def pack(arguments: argparse.Namespace) -> None:
    """Writes both data sets and, last, ``pairs.json``.

    Raises:
        DataError: bad input, or other data in the way.
    """
    output: Path = arguments.output
    if not arguments.overwrite:
        for place in (output / PAIRS, output / "source", output / "target"):
            require_free(place, "choose another --output, or replace it by --overwrite")
    if bool(arguments.input) == bool(arguments.source) or bool(arguments.source) != bool(arguments.target):
        raise DataError("name either --input, or both --source and --target")
    paths = arguments.input or [arguments.source, arguments.target]
    if missing := [path for path in paths if not path.is_file()]:
        raise DataError(
            f"{missing[0]} is a folder: name its files" if missing[0].is_dir() else f"no such input: {missing[0]}"
        )
    sources = find_sources(paths, kind=None if arguments.input else "lines")
    if others := [source.path for source in sources if source.kind == "text"]:
        raise DataError(f"{others[0]} is neither .jsonl, .parquet nor .arrow: --input reads these")
    digests = digest_sources(sources)
    tokenizer_json = load_tokenizer(arguments.tokenizer)
    encoder = Encoder(tokenizer_json, arguments.eod, "auto")
    problems: list[str] = []
    (output / PAIRS).unlink(missing_ok=True)
    made_from = {
        "inputs_sha256": digest_of_all(digests),
        "tokenizer_sha256": hashlib.sha256(tokenizer_json).hexdigest(),
        "max_tokens": [arguments.max_source_tokens, arguments.max_target_tokens],
    }

    def writer(side: str) -> DatasetWriter:
        return DatasetWriter(
            output / side,
            tokenizer=tokenizer_json,
            tokenizer_name=arguments.tokenizer.name,
            vocab_size=encoder.vocab_size,
            eod_id=encoder.eod_id,
            shard_tokens=arguments.shard_tokens,
            made_from={**made_from, "side": side},
        )

    num_pairs = num_long = 0
    with writer("source") as source_writer, writer("target") as target_writer:
        pairs = _pairs(sources, arguments, problems)
        while batch := list(itertools.islice(pairs, _BATCH)):
            encoded = [encoder.encode([pair[side] for pair in batch]) for side in (0, 1)]
            for source, target in zip(*encoded, strict=True):
                if len(source) >= arguments.max_source_tokens or len(target) >= arguments.max_target_tokens:
                    num_long += 1
                    continue
                source_writer.add(np.append(source, encoder.eod_id))
                target_writer.add(np.append(target, encoder.eod_id))
                num_pairs += 1
        lineage = lineage_of("pack_pairs", arguments, digests, encoder=encoder.backend)
        manifests = [side.finish(lineage) for side in (source_writer, target_writer)]
    facts = {"pairs": num_pairs, "too_long": num_long, "bad": len(problems), "source": "source", "target": "target"}
    write_durably(output / PAIRS, (json.dumps(facts, indent=2) + "\n").encode())
    tokens = " and ".join(str(manifest.num_tokens) for manifest in manifests)
    print(f"{output}: {num_pairs} pairs of {tokens} tokens; {num_long} too long, {len(problems)} bad ones left out")
    for problem in problems[:_PROBLEMS_SHOWN]:
        print(f"  {problem}")


def _pairs(sources: Sequence[Source], arguments: argparse.Namespace, problems: list[str]) -> Iterator[Pair]:
    found = _from_records(sources, arguments) if arguments.input else _from_two_files(*sources)
    for origin, pair in found:
        reason = pair if isinstance(pair, str) else "" if pair.source and pair.target else "an empty text"
        if not isinstance(pair, str) and not reason:
            yield pair
        elif arguments.bad == "fail":
            raise DataError(f"{origin}: {reason}. --bad skip leaves such pairs out")
        else:
            problems.append(f"{origin}: {reason}")


def _from_table(source: Source, arguments: argparse.Namespace) -> Iterator[tuple[str, Pair | str]]:
    columns = (read_rows(source.path, field) for field in (arguments.source_field, arguments.target_field))
    for (row, left), (_, right) in zip(*columns, strict=True):
        try:
            found = "no text (null)" if left is None or right is None else Pair(left.decode(), right.decode())
        except UnicodeDecodeError as error:
            found = f"invalid UTF-8 at byte {error.start}"
        yield f"{source.path}:{row}", found


def _from_records(sources: Sequence[Source], arguments: argparse.Namespace) -> Iterator[tuple[str, Pair | str]]:
    for source in sources:
        if source.kind == "table":
            yield from _from_table(source, arguments)
            continue
        for number, line in filter(lambda numbered: numbered[1].strip(), _lines(source)):
            origin = f"{source.path}:{number}"
            try:
                record = parse_json(line)
                pair = Pair(text_under(record, arguments.source_field), text_under(record, arguments.target_field))
                "".join(pair).encode()  # JSON can spell halves of surrogate pairs
                yield origin, pair
            except (BadRecord, UnicodeError) as error:
                yield origin, str(error)


def _from_two_files(first: Source, second: Source) -> Iterator[tuple[str, Pair | str]]:
    for left, right in itertools.zip_longest(_lines(first), _lines(second)):
        if left is None or right is None:
            longer, number = (first, left[0]) if left else (second, right[0])
            raise DataError(f"{longer.path} has more lines than the other file, from line {number}: no pairs")
        try:
            yield f"{first.path}:{left[0]}", Pair(left[1].decode(), right[1].decode())
        except UnicodeDecodeError as error:
            yield f"{first.path}:{left[0]}", f"invalid UTF-8 at byte {error.start}"


def _lines(source: Source) -> Iterator[tuple[int, bytes]]:
    try:
        with source.open() as file:
            refuse_array(file, source)
            for number, line in enumerate(file, 1):
                yield number, (line if number > 1 else line.removeprefix(BYTE_ORDER_MARK)).rstrip(b"\r\n")
    except READ_ERRORS as error:
        raise read_errors(source.path, error) from error


if __name__ == "__main__":
    sys.exit(main())
