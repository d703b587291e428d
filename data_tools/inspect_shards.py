"""What a data set holds: its manifest in short, any document as text, and on request a check of every byte."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from megatrain.data.console import run_tool
from megatrain.data.errors import DataError
from megatrain.data.reader import TokenDataset


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit code: 0, or 2 after an error message."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a data set")
    parser.add_argument("--document", type=int, help="number of a document to print, from 0")
    parser.add_argument("--verify", action="store_true", help="compare every byte with the digests")
    return run_tool(parser, inspect, argv)


def inspect(arguments: argparse.Namespace) -> None:
    """Prints the summary and what the options ask for.

    Raises:
        DataError: no readable data set, a damaged one under --verify, or no such document.
    """
    dataset = TokenDataset.open(arguments.folder)
    print(f"{arguments.folder}: {dataset.num_documents} documents, {dataset.num_tokens} tokens")
    if manifest := dataset.manifest:
        print(f"tokenizer {manifest.tokenizer}, vocabulary {manifest.vocab_size}, end of document {manifest.eod_id}")
        for shard in manifest.shards:
            print(f"  {shard.name}: {shard.documents} documents, {shard.tokens} tokens, highest id {shard.max_id}")
    if arguments.verify:
        dataset.verify()
        print("every byte is as it was written")
    if arguments.document is not None:
        print(_text(dataset, arguments.document))


def _text(dataset: TokenDataset, number: int) -> str:
    if not 0 <= number < dataset.num_documents:
        raise DataError(f"no document {number}: the data set has documents 0 to {dataset.num_documents - 1}")
    ids = dataset.document(number).tolist()
    if dataset.tokenizer_path is None:
        return str(ids)
    return str(Tokenizer.from_file(str(dataset.tokenizer_path)).decode(ids, skip_special_tokens=False))


if __name__ == "__main__":
    sys.exit(main())
