"""A data set -> the same documents in another order, in memory that doesn't grow with its tokens.

The documents are dealt at random into buckets on disk, each small enough for memory, and the buckets are shuffled one
by one: a uniformly random order, given by the seed. Memory: one bucket, and 12 bytes a document.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatrain.data.shards.format import read_index
from megatrain.data.shards.manifest import TOKENIZER, Manifest
from megatrain.data.shards.scan import document_lengths, read_blocks
from megatrain.data.shards.writer import BAD_RECORDS, DatasetWriter

_BUCKET_TOKENS = 16 << 20


def shuffle_documents(source: Path, target: Path, seed: int, shard_tokens: int) -> Manifest:
    """Writes ``target`` from the data set ``source``, and removes ``source``.

    The manifests say the same of where the documents come from.

    Raises:
        DataError: ``target`` is in use or is something else than a data set.
    """
    manifest = Manifest.read(source)
    stems = [source / shard.name for shard in manifest.shards]
    lengths = np.concatenate([document_lengths(read_index(stem.with_name(f"{stem.name}.idx"))) for stem in stems])
    num_buckets = -(-manifest.num_tokens // _BUCKET_TOKENS)
    buckets = np.random.default_rng([seed, 0]).integers(0, num_buckets, len(lengths), dtype=np.int32)
    dealt = source / "dealt"
    with DatasetWriter(
        target,
        tokenizer=(source / TOKENIZER).read_bytes(),
        tokenizer_name=manifest.tokenizer,
        vocab_size=manifest.vocab_size,
        eod_id=manifest.eod_id,
        shard_tokens=shard_tokens,
        made_from=manifest.made_from,
    ) as writer:
        _deal(stems, buckets, dealt)
        for bucket in range(num_buckets):
            _add_shuffled(writer, dealt / str(bucket), lengths[buckets == bucket], [seed, 1, bucket])
        if manifest.bad_records_sha256:
            shutil.copy(source / BAD_RECORDS, writer.partial / BAD_RECORDS)
        made = writer.finish(manifest.lineage, manifest.bad_records_sha256)
    shutil.rmtree(source)
    return made


def _deal(stems: Sequence[Path], buckets: NDArray[np.int32], folder: Path) -> None:
    """One file a bucket, of its documents in order."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    at = 0
    for stem in stems:
        for ids, lengths in read_blocks(stem):
            of_document = buckets[at : at + len(lengths)]
            of_token = of_document.repeat(lengths)
            order = np.argsort(of_token, kind="stable")
            found, begins = np.unique(of_token[order], return_index=True)
            for bucket, part in zip(found, np.split(ids[order], begins[1:]), strict=True):
                with open(folder / str(bucket), "ab") as file:
                    file.write(part.data)
            at += len(lengths)


def _add_shuffled(writer: DatasetWriter, path: Path, lengths: NDArray[np.int64], seed: list[int]) -> None:
    if not len(lengths):
        return
    documents = np.split(np.fromfile(path, writer.dtype), np.cumsum(lengths)[:-1])
    order = np.random.default_rng(seed).permutation(len(documents))
    writer.add_many(np.concatenate([documents[number] for number in order]), lengths[order])
    path.unlink()
