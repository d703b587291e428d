"""Megatron's .bin/.idx pairs -> a data set, with digests, CRCs and the tokenizer that they were made with."""

import argparse
import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megatrain.console import run_tool
from megatrain.data.corpus.console import lineage_of, print_left_out
from megatrain.data.corpus.encode import Encoder
from megatrain.data.corpus.inputs import Source, digest_of_all, digest_sources
from megatrain.data.corpus.tokenizer_files import load_tokenizer
from megatrain.data.errors import DataError
from megatrain.data.shards.manifest import MANIFEST
from megatrain.data.shards.scan import Block, read_blocks
from megatrain.data.shards.writer import DatasetWriter
from megatrain.disk.target import require_free


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit code: 0, or 2 after an error message."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", nargs="+", type=Path, required=True, help=".idx files, or folders of them")
    parser.add_argument("--tokenizer", type=Path, required=True, help="the tokenizer that made them, any kind of file")
    parser.add_argument("--eod", help="its end-of-document token (default: the usual one that it has)")
    parser.add_argument(
        "--without-eod",
        choices=["fail", "append", "keep"],
        default="fail",
        help="what documents get that don't end with it (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens that fill a shard")
    parser.add_argument("--overwrite", action="store_true", help="replace an older data set")
    return run_tool(parser, import_all, argv)


def import_all(arguments: argparse.Namespace) -> None:
    """Writes the data set.

    Raises:
        DataError: bad input, a token that the tokenizer doesn't have, or another data set in the way.
    """
    output: Path = arguments.output
    if not arguments.overwrite:
        require_free(output / MANIFEST, "choose another --output, or replace it by --overwrite")
    stems = _stems(arguments.input)
    taken = {stem.with_name(f"{stem.name}.{suffix}") for stem in stems for suffix in ("bin", "idx")}
    others = [path for folder in arguments.input for path in folder.rglob("*") if path.is_file() and path not in taken]
    print_left_out(others, "neither .idx nor its .bin, or deeper inside")
    tokenizer_json = load_tokenizer(arguments.tokenizer)
    encoder = Encoder(tokenizer_json, arguments.eod)
    files = [Source(stem.with_name(f"{stem.name}.{suffix}"), "table") for stem in stems for suffix in ("bin", "idx")]
    digests = digest_sources(files)
    num_changed = num_empty = 0
    with DatasetWriter(
        output,
        tokenizer=tokenizer_json,
        tokenizer_name=arguments.tokenizer.name,
        vocab_size=encoder.vocab_size,
        eod_id=encoder.eod_id,
        shard_tokens=arguments.shard_tokens,
        made_from={
            "inputs_sha256": digest_of_all(digests),
            "tokenizer_sha256": hashlib.sha256(tokenizer_json).hexdigest(),
            "without_eod": arguments.without_eod,
        },
    ) as writer:
        for stem in stems:
            for ids, lengths in _blocks(stem):
                num_empty += int(np.count_nonzero(lengths == 0))
                lengths = lengths[lengths > 0]
                ends = np.cumsum(lengths)
                without = np.flatnonzero(ids[ends - 1] != encoder.eod_id)
                num_changed += len(without)
                if len(without) and arguments.without_eod == "fail":
                    raise DataError(
                        f"{stem}: a document doesn't end with {encoder.eod!r} (token {encoder.eod_id}); "
                        "--without-eod append adds it, --without-eod keep leaves documents as they are"
                    )
                if arguments.without_eod == "append":
                    ids = np.insert(ids.astype(np.int64), ends[without], encoder.eod_id)
                    lengths = lengths + np.isin(np.arange(len(lengths)), without)
                writer.add_many(ids, lengths)
        made = writer.finish(lineage_of("import_megatron", arguments, digests))
    print(f"{output}: {made.num_documents} documents, {made.num_tokens} tokens in {len(made.shards)} shards")
    if num_changed or num_empty:
        done = "appended" if arguments.without_eod == "append" else "missing"
        print(f"{num_empty} empty documents left out; end-of-document token {done} in {num_changed} documents")


def _blocks(stem: Path) -> Iterator[Block]:
    path = stem.with_name(f"{stem.name}.bin")
    if not path.is_file():
        raise DataError(f"{path} is missing beside its .idx")
    num_tokens = 0
    for block in read_blocks(stem):
        num_tokens += len(block.ids)
        if len(block.ids) != block.lengths.sum():
            raise DataError(f"{path} is cut short: its index has more tokens")
        yield block
    if path.stat().st_size != num_tokens * block.ids.itemsize:
        raise DataError(f"{path} has {path.stat().st_size} bytes, its index says {num_tokens * block.ids.itemsize}")


def _stems(inputs: Sequence[Path]) -> list[Path]:
    stems = []
    for path in inputs:
        found = (
            sorted(path.glob("*.idx"))
            if path.is_dir()
            else [path.with_name(f"{path.name.removesuffix('.idx').removesuffix('.bin')}.idx")]
        )
        if not found or not all(file.is_file() for file in found):
            raise DataError(f"no .idx file at {path}")
        stems += [file.with_suffix("") for file in found]
    return stems


if __name__ == "__main__":
    sys.exit(main())
