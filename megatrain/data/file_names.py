"""Which files hold text, by the ends of their names."""

import collections
from collections.abc import Sequence
from pathlib import Path

_LISTED = 10  # kinds of ending
COMPRESSED = (".gz", ".bz2", ".zst", ".xz")
DEFAULT_SUFFIXES = (".txt", ".jsonl", ".ndjson", ".parquet", ".arrow")


def plain(path: Path) -> Path:
    """The path without the ending of a compressed file."""
    return path.with_suffix("") if path.suffix.lower() in COMPRESSED else path


def summary(paths: Sequence[Path]) -> str:
    """How many files there are of each ending, most first, as in "12 *.md, 1 *.json"."""
    endings = collections.Counter(f"*{path.suffix}" if path.suffix else "without ending" for path in paths)
    most_first = sorted(endings.items(), key=lambda counted: (-counted[1], counted[0]))
    return ", ".join(f"{count} {ending}" for ending, count in most_first[:_LISTED])
