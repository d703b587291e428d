"""Every byte of a data set, compared with what its manifest says."""

import functools
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from awscrt.checksums import crc32c

from megatrain.data.errors import DataError
from megatrain.data.pool import Pool
from megatrain.data.shards.format import BLOCK_SIZE, read_crcs, read_index
from megatrain.data.shards.manifest import MANIFEST, TOKENIZER, Manifest, Shard
from megatrain.data.shards.writer import BAD_RECORDS

_SUFFIXES = ("bin", "idx", "crc")


def find_problems(folder: Path, pool: Pool) -> Iterator[str]:
    """What is wrong with a data set, file by file; nothing if it is as it was written."""
    try:
        manifest = Manifest.read(folder)
    except DataError as error:
        yield str(error)
        return
    yield from _check_folder(folder, manifest)
    check = functools.partial(_check_shard, folder, manifest.dtype, manifest.vocab_size)
    for _, problems in pool.ordered(check, manifest.shards):
        yield from problems


def _check_folder(folder: Path, manifest: Manifest) -> Iterator[str]:
    digests = {TOKENIZER: manifest.tokenizer_sha256}
    if manifest.bad_records_sha256:
        digests[BAD_RECORDS] = manifest.bad_records_sha256
    for name, expected in digests.items():
        if not (folder / name).is_file():
            yield f"{folder / name} is missing"
        elif hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
            yield f"{folder / name} is not what it was: its SHA-256 is not {expected}"
    names = [f"{shard.name}.{suffix}" for shard in manifest.shards for suffix in _SUFFIXES]
    if len(set(names)) != len(names):
        yield f"{folder / MANIFEST} lists a shard twice"
    for name in sorted(set(os.listdir(folder)) - {MANIFEST, *digests, *names}):
        yield f"{folder / name} is not part of the data set"


def _check_shard(folder: Path, dtype: str, vocab_size: int, shard: Shard) -> list[str]:
    missing = [
        f"{folder / shard.name}.{suffix} is missing"
        for suffix in _SUFFIXES
        if not _path(folder, shard, suffix).is_file()
    ]
    if missing:
        return missing
    try:
        return [*_check_index(folder, dtype, shard), *_check_tokens(folder, dtype, vocab_size, shard)]
    except DataError as error:
        return [str(error)]


def _check_index(folder: Path, dtype: str, shard: Shard) -> Iterator[str]:
    path = _path(folder, shard, "idx")
    if hashlib.sha256(path.read_bytes()).hexdigest() != shard.idx_sha256:
        yield f"{path} is damaged: its SHA-256 is not {shard.idx_sha256}"
        return
    index = read_index(path)
    if index.dtype.name != dtype:
        yield f"{path} says that tokens are {index.dtype.name}, the manifest {dtype}"
    if index.num_documents != shard.documents:
        yield f"{path} has {index.num_documents} documents, the manifest {shard.documents}"
    if (tokens := int(np.sum(index.lengths(), dtype=np.int64))) != shard.tokens:
        yield f"{path} has {tokens} tokens, the manifest {shard.tokens}"


def _check_tokens(folder: Path, dtype: str, vocab_size: int, shard: Shard) -> Iterator[str]:
    path = _path(folder, shard, "bin")
    block_size, crcs = read_crcs(_path(folder, shard, "crc"))
    size = shard.tokens * np.dtype(dtype).itemsize
    if (found := path.stat().st_size) != size:
        yield f"{path} has {found} bytes, expected {size}"
    if block_size != BLOCK_SIZE or len(crcs) != -(-size // BLOCK_SIZE):
        yield f"{_path(folder, shard, 'crc')} has {len(crcs)} CRCs of {block_size} bytes each: it is damaged"
    sha256, max_id, number = hashlib.sha256(), 0, 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK_SIZE):
            sha256.update(block)
            if number < len(crcs) and crc32c(block) != crcs[number]:
                yield f"{path} and its .crc differ in block {number} (bytes {number * BLOCK_SIZE} to {file.tell()})"
            whole = len(block) // np.dtype(dtype).itemsize
            max_id = max(max_id, int(np.frombuffer(block, dtype, whole).max(initial=0)))
            number += 1
    if sha256.hexdigest() != shard.bin_sha256:
        yield f"{path} is damaged: its SHA-256 is not {shard.bin_sha256}"
    if max_id != shard.max_id or max_id >= vocab_size:
        yield f"{path}: the highest token id is {max_id}, expected {shard.max_id} of a vocabulary of {vocab_size}"


def _path(folder: Path, shard: Shard, suffix: str) -> Path:
    return folder / f"{shard.name}.{suffix}"
