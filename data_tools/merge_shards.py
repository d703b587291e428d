"""Data sets of one tokenizer -> one data set: their shards, in the order in which they are named."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatrain.console import run_tool
from megatrain.data.corpus.console import lineage_of
from megatrain.data.corpus.inputs import InputDigest
from megatrain.data.errors import DataError
from megatrain.data.shards.manifest import MANIFEST, TOKENIZER, Manifest, digest_of
from megatrain.data.shards.shuffle import shuffle_documents
from megatrain.data.shards.writer import DatasetWriter
from megatrain.disk.target import require_free


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit code: 0, or 2 after an error message."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", type=Path, required=True, help="data sets")
    parser.add_argument("--output", type=Path, required=True, help="folder of the merged data set")
    parser.add_argument(
        "--shuffle-seed", type=int, help="shuffle all documents, by this seed (default: keep the order)"
    )
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens that fill a shard, if shuffled")
    parser.add_argument("--overwrite", action="store_true", help="replace an older data set")
    return run_tool(parser, merge, argv)


def merge(arguments: argparse.Namespace) -> None:
    """Writes the merged data set.

    Raises:
        DataError: the data sets don't fit together or are damaged, or another data set is in the way.
    """
    output: Path = arguments.output
    manifests = [Manifest.read(folder) for folder in arguments.input]
    _check_alike(arguments.input, manifests)
    if not arguments.overwrite:
        require_free(output / MANIFEST, "choose another --output, or replace it by --overwrite")
    digests = [
        digest_of([digest for shard in manifest.shards for digest in (shard.bin_sha256, shard.idx_sha256)])
        for manifest in manifests
    ]
    pairs = zip(arguments.input, manifests, digests, strict=True)
    inputs = [InputDigest(str(folder), "table", manifest.num_tokens, digest) for folder, manifest, digest in pairs]
    first = manifests[0]
    shuffled = arguments.shuffle_seed is not None
    target = output.absolute().with_name(f".{output.absolute().name}.unshuffled") if shuffled else output
    with DatasetWriter(
        target,
        tokenizer=(arguments.input[0] / TOKENIZER).read_bytes(),
        tokenizer_name=first.tokenizer,
        vocab_size=first.vocab_size,
        eod_id=first.eod_id,
        made_from={"merged": digests, "shuffle_seed": arguments.shuffle_seed},
    ) as writer:
        for folder, manifest in zip(arguments.input, manifests, strict=True):
            for shard in manifest.shards:
                writer.add_shard(folder, shard)
        made = writer.finish(lineage_of("merge_shards", arguments, inputs))
    if shuffled:
        made = shuffle_documents(target, output, arguments.shuffle_seed, arguments.shard_tokens)
    print(f"{output}: {made.num_documents} documents, {made.num_tokens} tokens in {len(made.shards)} shards")


def _check_alike(folders: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    first = manifests[0]
    for folder, manifest in zip(folders, manifests, strict=True):
        for name in ("tokenizer_sha256", "vocab_size", "dtype", "eod_id"):
            if getattr(manifest, name) != getattr(first, name):
                raise DataError(
                    f"{folders[0]} and {folder} don't fit together: {name} is {getattr(first, name)} and "
                    f"{getattr(manifest, name)}; tokenize one of them again"
                )


if __name__ == "__main__":
    sys.exit(main())
