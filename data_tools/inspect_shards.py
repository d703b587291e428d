"""What a data set holds: its manifest in short, documents as text, its tokens counted, its documents' lengths."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from megatrain.console import run_tool
from megatrain.data.corpus.length_chart import draw_lengths
from megatrain.data.errors import DataError
from megatrain.data.pool import open_pool
from megatrain.data.shards.format import read_index
from megatrain.data.shards.reader import TokenDataset
from megatrain.data.shards.scan import document_lengths, read_blocks
from megatrain.data.shards.verify import find_problems
from megatrain.disk.target import require_target

_PERCENTILES = (0, 10, 50, 90, 99, 100)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit code: 0, or 2 after an error message."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a data set, or a folder of Megatron's .bin/.idx pairs")
    parser.add_argument("--document", type=int, nargs="+", default=[], help="numbers of documents to print, from 0")
    parser.add_argument("--ids", action="store_true", help="print documents as token ids")
    parser.add_argument("--histogram", type=int, metavar="N", help="count all tokens and print the N most frequent")
    parser.add_argument("--lengths", type=Path, metavar="PNG", help="draw the distribution of the documents' lengths")
    parser.add_argument("--overwrite", action="store_true", help="replace an older picture")
    parser.add_argument("--verify", action="store_true", help="compare every byte with the digests")
    return run_tool(parser, inspect, argv)


def inspect(arguments: argparse.Namespace) -> None:
    """Prints the summary and what the options ask for.

    Raises:
        DataError: no readable data set, a damaged one under --verify, or no such document.
    """
    folder: Path = arguments.folder
    if arguments.lengths:
        require_target(arguments.lengths, arguments.overwrite)
    dataset = TokenDataset.open(folder)
    stems = sorted(path.with_suffix("") for path in folder.glob("*.idx"))
    if dataset.manifest:
        stems = [folder / shard.name for shard in dataset.manifest.shards]
    tokenizer = Tokenizer.from_file(str(dataset.tokenizer_path)) if dataset.tokenizer_path else None
    _print_summary(folder, dataset, stems)
    if arguments.verify:
        with open_pool(1) as pool:
            if problems := list(find_problems(folder, pool)):
                raise DataError("; ".join(problems))
        print("every byte is as it was written")
    if arguments.lengths:
        draw_lengths(_lengths(stems), arguments.lengths)
        print(f"lengths drawn to {arguments.lengths}")
    if arguments.histogram is not None:
        _print_histogram(_counts(stems), arguments.histogram, tokenizer)
    for number in arguments.document:
        if not 0 <= number < dataset.num_documents:
            raise DataError(f"no document {number}: the data set has documents 0 to {dataset.num_documents - 1}")
        ids = dataset.document(number).tolist()
        print(ids if arguments.ids or tokenizer is None else tokenizer.decode(ids, skip_special_tokens=False))


def _print_summary(folder: Path, dataset: TokenDataset, stems: Sequence[Path]) -> None:
    print(f"{folder}: {dataset.num_documents} documents, {dataset.num_tokens} tokens")
    if manifest := dataset.manifest:
        print(f"tokenizer {manifest.tokenizer}, vocabulary {manifest.vocab_size}, end of document {manifest.eod_id}")
        for shard in manifest.shards:
            print(f"  {shard.name}: {shard.documents} documents, {shard.tokens} tokens, highest id {shard.max_id}")
        command = manifest.lineage.get("command", {})
        print(
            "made by " + " ".join(f"{key}={value}" for key, value in command.items() if value not in (None, "None", []))
        )
    values = np.percentile(_lengths(stems), _PERCENTILES, method="nearest")
    named = zip(("shortest", "10 %", "median", "90 %", "99 %", "longest"), values, strict=True)
    print("tokens a document: " + ", ".join(f"{name} {value}" for name, value in named))


def _lengths(stems: Sequence[Path]) -> NDArray[np.int64]:
    return np.concatenate([document_lengths(read_index(stem.with_name(f"{stem.name}.idx"))) for stem in stems])


def _counts(stems: Sequence[Path]) -> NDArray[np.int64]:
    """How often each token id occurs."""
    counts = np.zeros(0, np.int64)
    for stem in stems:
        for ids, _ in read_blocks(stem):
            found = np.bincount(ids, minlength=len(counts))
            found[: len(counts)] += counts
            counts = found
    return counts


def _print_histogram(counts: NDArray[np.int64], number: int, tokenizer: Tokenizer | None) -> None:
    total = int(counts.sum())
    shares = counts[counts > 0] / total
    print(f"{len(shares)} different tokens; entropy {-(shares * np.log2(shares)).sum():.2f} bits a token")
    order = np.argsort(-counts, kind="stable")[:number]
    most = int(counts[order[0]]) if number else 1
    for token in order[counts[order] > 0].tolist():
        text = repr(tokenizer.decode([token], skip_special_tokens=False)) if tokenizer else ""
        bar = "█" * max(1, round(30 * int(counts[token]) / most))
        print(f"{token:>8} {counts[token]:>12} {counts[token] / total:>7.2%}  {text:<16} {bar}")


if __name__ == "__main__":
    sys.exit(main())
