"""Loader against megatron-core's GPTDataset and a raw np.memmap: tokens per CPU-second, and how soon it starts.

    python -m benchmarks.data_read

Writes synthetic data sets below --folder (about 5 GB with --documents 100000000) unless they are there.
"""

import argparse
import functools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from awscrt.checksums import crc32c

from benchmarks.paired import describe_machine, interleaved, median_ratio
from megatrain.config.derive import resolve
from megatrain.config.schema import RunConfig
from megatrain.data.feed.training import TrainingData
from megatrain.data.shards.format import BLOCK_SIZE, crc_bytes, index_bytes
from megatrain.data.shards.manifest import Manifest, Shard

SEQ_LEN, BATCH, VOCAB_SIZE, EOD_ID = 2048, 8, 50_257, 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "megatrain-data-read"))
    parser.add_argument("--tokens", type=int, default=1_000_000_000, help="of the data set that is read (default: 1e9)")
    parser.add_argument("--documents", type=int, default=100_000_000, help="of the larger index (default: 1e8)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=400, help="batches of one repeat")
    parser.add_argument("--first-batch", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.first_batch:
        return print_first_batch(options.first_batch)
    torch.set_num_threads(1)
    print(describe_machine("torch", "megatron-core", "numpy"))
    text = random_data_set(options.folder / "tokens", options.tokens, options.tokens // 1000)
    candidates = {name: make(text) for name, make in READERS.items()}
    for read in candidates.values():
        read(64)  # warm: what each builds, and the page cache
    # the slow ones read less, so that all take about as long
    rounds: dict[str, Callable[[], object]]
    rounds = {name: functools.partial(read, options.steps // PARTS.get(name, 1)) for name, read in candidates.items()}
    seconds = interleaved(rounds, options.repeats)
    each = {name: [s * PARTS.get(name, 1) for s in times] for name, times in seconds.items()}
    tokens = options.steps * BATCH * SEQ_LEN
    for name, times in each.items():
        ours = "megatrain, documents" if "document" in name else "megatrain"
        ratio = median_ratio(times, each[ours])
        print(f"{name:36} {tokens / sorted(times)[len(times) // 2] / 1e6:8.1f} Mtok per CPU-s; {ours} is {ratio:.1f} x")
    for documents in (1_000_000, options.documents):
        folder = sparse_data_set(options.folder / f"documents-{documents}", documents)
        command = [sys.executable, "-m", "benchmarks.data_read", "--folder", ".", "--first-batch", folder]
        print(
            f"{documents:.0e} documents:",
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip(),
        )


def print_first_batch(folder: str) -> None:
    """Measures in a process of its own: opening, the first batch, a far one, and the memory."""
    imported = peak_memory()
    begin = time.process_time()
    data = training_data(folder, "concatenate")
    loader = data.loader(0, 1)
    loader.batch(0)
    first = time.process_time()
    again = training_data(folder, "concatenate").loader(0, 1)
    far = time.process_time()
    again.batch(10**12 // BATCH)
    end = time.process_time()
    memory = peak_memory()
    print(
        f"first batch after {1e3 * (first - begin):.1f} CPU-ms, sample 10^12 after {1e3 * (end - far):.1f} CPU-ms, "
        f"peak memory {memory:.0f} MiB, {imported:.0f} of them torch and other imports"
    )


def peak_memory() -> float:
    """MiB that this process has had in memory at most."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024


def training_data(folder: str, sequences: str) -> TrainingData:
    return TrainingData(
        resolve(
            RunConfig.model_validate(
                {
                    "data": {"train": folder, "seq_len": SEQ_LEN, "sequences": sequences},
                    "train": {"global_batch_size": BATCH},
                    "model": {"vocab_size": VOCAB_SIZE},
                }
            ),
            world_size=1,
        ),
        VOCAB_SIZE,
    )


def megatrain(sequences: str) -> Callable[[str], Callable[[int], None]]:
    def make(folder: str) -> Callable[[int], None]:
        data = training_data(folder, sequences)
        dataset, begin = data.datasets["train"], time.process_time()
        for first in range(0, dataset.num_tokens, BLOCK_SIZE // dataset.dtype.itemsize):
            dataset.tokens(first, 1)  # checks the block: once a run, so not in what is timed below
        print(f"checking all blocks at their first touch: {time.process_time() - begin:.2f} CPU-s")
        loader = data.loader(0, 1)
        steps = iter(range(10**9))

        def read(count: int) -> None:
            for _ in range(count):
                loader.batch(next(steps))

        return read

    return make


def raw_memmap(folder: str) -> Callable[[int], None]:
    """Windows at random places, drawn with replacement: what small training scripts do."""
    tokens = np.memmap(f"{folder}/tokens-00000.bin", "<u2", "r")
    random = np.random.default_rng(0)

    def read(count: int) -> None:
        for _ in range(count):
            starts = random.integers(0, len(tokens) - SEQ_LEN - 1, BATCH)
            windows = [torch.from_numpy(tokens[s : s + SEQ_LEN + 1].astype(np.int64)) for s in starts]
            torch.stack([w[:-1] for w in windows]), torch.stack([w[1:] for w in windows])

    return read


def gpt_dataset(masks: bool, attention: bool = False) -> Callable[[str], Callable[[int], None]]:
    """megatron-core's, over the same files; ``masks``: its document masks, ``attention``: its default causal one."""

    def make(folder: str) -> Callable[[int], None]:
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.indexed_dataset import IndexedDataset
        from megatron.core.datasets.utils import Split

        tokenizer: Any = SimpleNamespace(eod=EOD_ID, unique_identifiers={"class": "none"}, vocab_size=VOCAB_SIZE)
        config = GPTDatasetConfig(
            random_seed=1234,
            sequence_length=SEQ_LEN,
            blend=([f"{folder}/tokens-00000"], None),
            split="1,0,0",
            path_to_cache=f"{folder}/../cache",
            reset_position_ids=masks,
            reset_attention_mask=masks,
            eod_mask_loss=masks,
            create_attention_mask=masks or attention,
            tokenizer=tokenizer,
        )
        indexed = IndexedDataset(f"{folder}/tokens-00000", mmap=True)
        documents = np.arange(len(indexed.document_indices) - 1, dtype=np.int32)
        dataset = GPTDataset(indexed, f"{folder}/tokens-00000", documents, None, Split.train, config)
        samples = _endless(len(dataset))

        def read(count: int) -> None:
            for _ in range(count):
                torch.utils.data.default_collate([dataset[next(samples)] for _ in range(BATCH)])

        return read

    return make


def _endless(count: int) -> Iterator[int]:
    while True:
        yield from range(count)


READERS = {
    "megatrain": megatrain("concatenate"),
    "megatrain, documents": megatrain("mask_documents"),
    "megatron-core, no mask": gpt_dataset(masks=False),
    "megatron-core, default mask": gpt_dataset(masks=False, attention=True),
    "megatron-core, document masks": gpt_dataset(masks=True),
    "np.memmap": raw_memmap,
}
PARTS = {
    "megatron-core, no mask": 8,
    "megatron-core, default mask": 100,
    "megatron-core, document masks": 200,
    "np.memmap": 8,
}


def random_data_set(folder: Path, num_tokens: int, num_documents: int) -> str:
    """Random tokens, documents of 1 to 2000 tokens."""
    if (folder / "manifest.json").is_file():
        return str(folder)
    random = np.random.default_rng(0)
    lengths = random.integers(1, 2 * num_tokens // num_documents, num_documents).astype(np.int32)
    tokens = random.integers(1, VOCAB_SIZE, int(lengths.sum()), dtype=np.uint16)
    tokens[np.cumsum(lengths) - 1] = EOD_ID
    folder.mkdir(parents=True)
    content = tokens.view(np.uint8).data
    (folder / "tokens-00000.bin").write_bytes(content)
    crcs = [crc32c(bytes(content[at : at + BLOCK_SIZE])) for at in range(0, len(content), BLOCK_SIZE)]
    return write_rest(folder, lengths, crcs)


def sparse_data_set(folder: Path, num_documents: int) -> str:
    """Documents of 10 zeros, in a file without blocks on disk: only the index is large."""
    if (folder / "manifest.json").is_file():
        return str(folder)
    lengths = np.full(num_documents, 10, np.int32)
    size = 2 * 10 * num_documents
    folder.mkdir(parents=True)
    with open(folder / "tokens-00000.bin", "wb") as file:
        file.truncate(size)
    whole, rest = divmod(size, BLOCK_SIZE)
    crcs = [crc32c(bytes(BLOCK_SIZE))] * whole + [crc32c(bytes(rest))] * bool(rest)
    return write_rest(folder, lengths, crcs)


def write_rest(folder: Path, lengths: np.ndarray, crcs: list[int]) -> str:
    """Index, CRCs and manifest of one shard."""
    (folder / "tokens-00000.idx").write_bytes(index_bytes(lengths, np.dtype("<u2")))
    (folder / "tokens-00000.crc").write_bytes(crc_bytes(crcs))
    shard = Shard("tokens-00000", len(lengths), int(lengths.sum()), VOCAB_SIZE - 1, "0" * 64, "0" * 64)
    Manifest("none", "0" * 64, VOCAB_SIZE, "uint16", EOD_ID, (shard,), "", {}, {}).write(folder)
    return str(folder)


if __name__ == "__main__":
    main()
