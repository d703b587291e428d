"""What every command-line tool of the data room does alike."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatrain.data.documents import DEFAULT_SUFFIXES
from megatrain.data.errors import DataError


def run_tool(
    parser: argparse.ArgumentParser, body: Callable[[argparse.Namespace], None], argv: Sequence[str] | None
) -> int:
    """Parses ``argv`` (None: the process's) and runs ``body``; returns the exit code.

    What the user can mend is one line on stderr and code 2; with --debug it is raised.
    """
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args(argv)
    try:
        body(arguments)
    except (DataError, OSError) as error:
        if arguments.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def add_input_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which documents are read."""
    parser.add_argument(
        "--input", nargs="+", type=Path, required=True, help="text files, .jsonl files, and folders of them"
    )
    parser.add_argument(
        "--suffix", nargs="+", default=list(DEFAULT_SUFFIXES), help="files to take from folders (default: %(default)s)"
    )
    parser.add_argument("--exclude", nargs="+", default=[], help="names of files and folders to leave out of folders")
    parser.add_argument("--field", default="text", help="key of the text in JSON lines (default: %(default)s)")
    parser.add_argument(
        "--bad",
        choices=["fail", "skip", "replace"],
        default="fail",
        help="what invalid UTF-8 and broken JSON lines get (default: %(default)s)",
    )
