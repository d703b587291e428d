"""Text -> better text: normalised letters, no documents that break a quality rule, no duplicates.

Reads what tokenize_text.py reads, and writes JSON lines with "text" and "origin". The first of several duplicates
stays. Says for every rule how many documents and bytes it took. docs/data_format.md lists the rules.
"""

import argparse
import bz2
import collections
import functools
import gzip
import hashlib
import heapq
import json
import lzma
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm  # type: ignore[import-untyped]

from megatrain.config.extras import missing
from megatrain.console import run_tool
from megatrain.data.corpus.chunks import CHUNK_BYTES
from megatrain.data.corpus.console import add_input_options, print_problems, reader_of, sources_of
from megatrain.data.corpus.documents import Document
from megatrain.data.corpus.quality import DEFAULT_RULES, RULES, Form, broken_rule, normalize
from megatrain.data.errors import DataError
from megatrain.data.file_names import COMPRESSED, plain
from megatrain.data.pool import num_cores, open_pool
from megatrain.disk.durable import fsync_folder, write_durably
from megatrain.disk.target import require_target

_PROBLEMS_SHOWN = 10


class Judged(NamedTuple):
    """A document after normalisation. ``rule``: that it breaks; ``key``, ``signature``: for finding duplicates."""

    text: str
    origin: str
    rule: str | None
    key: bytes
    signature: NDArray[np.uint32] | None


class Samples:
    """Some documents of each rule, drawn by the hash of their text, so that another run draws the same.

    Args:
        per_rule: how many to keep; all of them are in memory.
    """

    def __init__(self, per_rule: int):
        self._per_rule = per_rule
        self._kept: dict[str, list[tuple[int, str, str]]] = {}

    def add(self, rule: str, document: Judged) -> None:
        """Takes a document that ``rule`` took."""
        kept = self._kept.setdefault(rule, [])
        number = int.from_bytes(hashlib.blake2b(document.text.encode(), digest_size=8).digest())
        heapq.heappush(kept, (-number, document.origin, document.text))
        if len(kept) > self._per_rule:
            heapq.heappop(kept)  # the largest hash

    def lines(self) -> bytes:
        """JSON lines with "rule", "origin" and "text"."""
        records = [
            {"rule": rule, "origin": origin, "text": text}
            for rule, kept in sorted(self._kept.items())
            for _, origin, text in sorted(kept, reverse=True)
        ]
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit code: 0, or 2 after an error message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_input_options(parser)
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="a .jsonl file, also as .jsonl.gz, .bz2, .zst or .xz",
    )
    parser.add_argument("--report", type=Path, help="a .json file for the counts")
    parser.add_argument("--samples", type=Path, help="a .jsonl file for samples of what each rule took")
    parser.add_argument("--samples-per-rule", type=int, default=20, help="documents (default: %(default)s)")
    parser.add_argument(
        "--normalize", choices=["NFC", "NFKC", "none"], default="NFC", help="Unicode form (default: %(default)s)"
    )
    parser.add_argument(
        "--rules", nargs="*", choices=list(RULES), default=list(DEFAULT_RULES), help="(default: %(default)s)"
    )
    parser.add_argument(
        "--duplicates",
        choices=["keep", "exact", "near"],
        default="near",
        help="what goes: none, documents of the same words, or also nearly the same ones (default: %(default)s)",
    )
    parser.add_argument(
        "--threshold", type=float, default=0.8, help="share of runs of five words from which two are nearly the same"
    )
    parser.add_argument("--workers", type=int, default=num_cores(), help="processes (default: one per core)")
    parser.add_argument("--overwrite", action="store_true", help="replace an older output")
    return run_tool(parser, clean, argv)


def clean(arguments: argparse.Namespace) -> None:
    """Writes the documents that stay.

    Raises:
        DataError: bad input or options.
        FileExistsError: another file in the way.
    """
    for place in filter(None, (arguments.output, arguments.report, arguments.samples)):
        require_target(place, arguments.overwrite)
    if plain(arguments.output).suffix.lower() not in (".jsonl", ".ndjson"):
        endings = ", ".join(f".jsonl{ending}" for ending in ("", *COMPRESSED))
        raise DataError(f"--output is {arguments.output}: it holds JSON lines, so it must end in one of {endings}")
    if not 0 < arguments.threshold <= 1 or arguments.workers < 1:
        raise DataError("--threshold must be above 0 and at most 1, --workers at least 1")
    reader = reader_of(arguments)
    sources = sources_of(arguments)
    judge = functools.partial(
        judge_batch, form=arguments.normalize, rules=tuple(arguments.rules), duplicates=arguments.duplicates
    )
    counts: collections.Counter[str] = collections.Counter()
    num_bytes: collections.Counter[str] = collections.Counter()
    samples = Samples(arguments.samples_per_rule if arguments.samples else 0)
    seen = _duplicates(arguments)
    partial = arguments.output.with_name(f".{arguments.output.name}.partial")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    partial.unlink(missing_ok=True)
    with open_pool(arguments.workers) as pool, _open(partial, arguments.output) as file:
        results = pool.ordered(judge, _batches(reader.read_all(sources)))
        with tqdm(unit="B", unit_scale=True, desc="clean", disable=None) as bar:
            for batch, judged in results:
                for document in judged:
                    fate = document.rule or _duplicate(document, seen) or "kept"
                    size = len(document.text.encode())
                    counts[fate] += 1
                    num_bytes[fate] += size
                    if fate == "kept":
                        record = {"text": document.text, "origin": document.origin}
                        file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                    else:
                        samples.add(fate, document)
                bar.update(sum(len(document.text) for document in batch))
    _give_name(partial, arguments.output)
    print_problems(reader.problems[:_PROBLEMS_SHOWN], len(reader.problems))
    _report(arguments, counts, num_bytes, len(reader.problems))
    if arguments.samples:
        write_durably(arguments.samples, samples.lines())


def judge_batch(documents: Sequence[Document], form: Form, rules: Sequence[str], duplicates: str) -> list[Judged]:
    """The work of one process."""
    judged = []
    for document in documents:
        text = normalize(document.text, form)
        rule = broken_rule(text, rules)
        key, values = b"", None
        if rule is None and duplicates != "keep":
            from megatrain.data.corpus.duplicates import exact_key, signature

            key = exact_key(text)
            values = signature(text) if duplicates == "near" else None
        judged.append(Judged(text, document.origin, rule, key, values))
    return judged


def _duplicates(arguments: argparse.Namespace) -> Any:
    if arguments.duplicates == "keep":
        return None
    try:
        from megatrain.data.corpus.duplicates import Duplicates
    except ImportError as error:
        raise DataError(missing("datasketch", "finding duplicates", error)) from error
    return Duplicates(arguments.threshold)


def _duplicate(document: Judged, seen: Any) -> str | None:
    if seen is None:
        return None
    if seen.is_exact(document.key):
        return "exact-duplicate"
    if document.signature is not None and seen.is_near(document.signature):
        return "near-duplicate"
    return None


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= CHUNK_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _open(partial: Path, output: Path) -> IO[bytes]:
    ending = output.suffix.lower()
    if ending == ".gz":
        return gzip.GzipFile(filename="", mode="wb", fileobj=open(partial, "wb"), mtime=0)  # type: ignore[return-value]
    if ending == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise DataError(missing("zstandard", f"writing {output}", error)) from error
        return zstandard.open(partial, "wb")  # type: ignore[no-any-return]
    if ending == ".bz2":
        return bz2.open(partial, "wb")
    return lzma.open(partial, "wb") if ending == ".xz" else open(partial, "wb")


def _give_name(partial: Path, output: Path) -> None:
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    partial.replace(output)
    fsync_folder(output.parent)


def _report(
    arguments: argparse.Namespace,
    counts: collections.Counter[str],
    num_bytes: collections.Counter[str],
    num_bad: int,
) -> None:
    names = ["empty", *arguments.rules, "exact-duplicate", "near-duplicate", "kept"]
    for name in names:
        print(f"{name:<16} {counts[name]:>10} documents {num_bytes[name]:>14} bytes")
    if arguments.report:
        fates = {name: {"documents": counts[name], "bytes": num_bytes[name]} for name in names}
        write_durably(arguments.report, (json.dumps({"bad_records": num_bad, **fates}, indent=2) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
