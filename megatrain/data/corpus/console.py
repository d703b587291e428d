"""The options that tools of the data room share, and what they report alike."""

import argparse
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatrain import __version__
from megatrain.data.corpus.documents import RecordReader
from megatrain.data.corpus.inputs import InputDigest, Source, find_sources, left_out_lines
from megatrain.data.file_names import DEFAULT_SUFFIXES

_INPUTS_LISTED = 1000
_WITHOUT_EFFECT = {"output", "validation_output", "workers", "overwrite", "debug", "backend"}


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which documents are read; ``sources_of`` and ``reader_of`` take them."""
    parser.add_argument(
        "--input",
        nargs="+",
        type=Path,
        required=True,
        metavar="PATH",
        help="text files, .jsonl, .parquet, .arrow, each but the tables also as .gz, .bz2, .zst or .xz; folders of "
        "them, and folders that the datasets library saved; - is standard input",
    )
    parser.add_argument(
        "--suffix", nargs="+", default=list(DEFAULT_SUFFIXES), help="files to take from folders (default: %(default)s)"
    )
    parser.add_argument("--exclude", nargs="+", default=[], help="names of files and folders to leave out of folders")
    parser.add_argument(
        "--format",
        choices=["text", "lines", "jsonl", "table"],
        help="what files hold: a document each, or one a line, or one in each line's JSON, or one in each row "
        "(default: as the suffix says; standard input: jsonl)",
    )
    parser.add_argument(
        "--field",
        default="text",
        help="key of the text in JSON lines, column of tables (a.b: b inside a) (default: %(default)s)",
    )
    parser.add_argument(
        "--bad",
        choices=["fail", "skip", "replace"],
        default="fail",
        help="what invalid UTF-8, broken JSON and values that are no text get; replace repairs characters and skips "
        "the rest (default: %(default)s)",
    )
    parser.add_argument(
        "--empty", choices=["fail", "skip"], default="skip", help="what empty documents get (default: %(default)s)"
    )


def sources_of(arguments: argparse.Namespace) -> list[Source]:
    """The inputs that the options name; says on stderr what is left out of folders.

    Raises:
        DataError: one is not there, or nothing was found.
    """
    left_out: list[Path] = []
    options = (arguments.suffix, arguments.exclude, arguments.format, arguments.field)
    sources = find_sources(arguments.input, *options, left_out)
    print_left_out(left_out, "other endings, see --suffix, and links to folders, which can be named by --input")
    return sources


def print_left_out(left_out: Sequence[Path], why: str) -> None:
    """Says on stderr which files a tool does not read."""
    for line in left_out_lines(left_out, why):
        print(line, file=sys.stderr)


def reader_of(arguments: argparse.Namespace) -> RecordReader:
    """The reader that follows the options' policies."""
    return RecordReader(arguments.bad, arguments.empty)


def print_problems(problems: Sequence[str], count: int) -> None:
    """Says how many bad records there were, and shows the first ones."""
    if count:
        print(f"{count} bad records left out or repaired:")
        for problem in problems:
            print(f"  {problem}")
        if count > len(problems):
            print(f"  … and {count - len(problems)} more")


def lineage_of(
    tool: str, arguments: argparse.Namespace, inputs: Sequence[InputDigest], **versions: str
) -> dict[str, Any]:
    """Where a data set comes from, for its manifest: nothing that varies between runs that give the same data.

    Args:
        arguments: the tool's; all that the content depends on are recorded.
        versions: of what else has worked on it.
    """
    options = {
        name: [str(word) for word in value] if isinstance(value, list) else value if value is None else str(value)
        for name, value in sorted(vars(arguments).items())
        if name not in _WITHOUT_EFFECT
    }
    listed = [{"path": i.path, "bytes": i.num_bytes, "sha256": i.sha256} for i in inputs[:_INPUTS_LISTED]]
    return {
        "command": {"tool": tool, **options},
        "inputs": listed,
        "num_inputs": len(inputs),
        "input_bytes": sum(i.num_bytes for i in inputs),
        "versions": {"megatrain": __version__, "python": platform.python_version(), **versions},
    }
