"""Tokenise and write: ours against installed peers, on the same JSON lines with the same tokenizer, in turns.

    python -m benchmarks.data_write --input text.jsonl --tokenizer tokenizer.json

Without --input the text is the standard library's sources, as often as needed, and without --tokenizer one is trained.
Each candidate runs in a process of its own. Counted are, from the end of its imports to the end of its writing, the
time on the clock, the CPU time of it and its workers, and the highest memory of all of them together (PSS: a page that
several of them share counts once).
"""

import argparse
import itertools
import json
import multiprocessing
import resource
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from megatrain.data.pool import num_cores

_BATCH = 1000
_tokenizer: Any = None


class Cost(NamedTuple):
    """What one run costs. ``seconds``: on the clock; ``cpu``: seconds; ``tokens``: written; ``peak``: bytes."""

    seconds: float
    cpu: float
    tokens: int
    peak: int


class Job(NamedTuple):
    """What every candidate gets."""

    input: str
    tokenizer: str
    output: str
    workers: int | None


def ours(job: Job, backend: str) -> int:
    """data_tools/tokenize_text.py as it is."""
    from data_tools import tokenize_text
    from megatrain.data.shards.manifest import Manifest

    words = ["--input", job.input, "--tokenizer", job.tokenizer, "--output", job.output]
    words += ["--workers", str(job.workers)] if job.workers else []
    assert tokenize_text.main([*words, "--backend", backend]) == 0
    return Manifest.read(Path(job.output)).num_tokens


def megatron(job: Job) -> int:
    """What Megatron's preprocess_data.py does: processes encode line by line, one writes through the builder."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{job.output}.bin", dtype=np.uint16)
    num_tokens = 0
    with (
        multiprocessing.Pool(job.workers or num_cores(), _start_megatron_worker, (job.tokenizer,)) as pool,
        open(job.input) as lines,
    ):
        for ids in pool.imap(_encode_line, lines, 32):
            builder.add_document(torch.IntTensor(ids), [len(ids)])
            num_tokens += len(ids)
    builder.finalize(f"{job.output}.idx")
    return num_tokens


def _start_megatron_worker(tokenizer: str) -> None:
    from tokenizers import Tokenizer

    global _tokenizer
    _tokenizer = Tokenizer.from_file(tokenizer)


def _encode_line(line: str) -> list[int]:
    return [*_tokenizer.encode(json.loads(line)["text"]).ids, 0]


def batch_loop(job: Job) -> int:
    """The loop that a person writes: encode_batch_fast on a thousand texts at a time, tokens to a file."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(job.tokenizer)
    num_tokens = 0
    with open(job.input) as lines, open(job.output, "wb") as file:
        while batch := [json.loads(line)["text"] for line in itertools.islice(lines, _BATCH)]:
            for encoding in tokenizer.encode_batch_fast(batch):
                ids = np.array([*encoding.ids, 0], np.uint16)
                file.write(ids.data)
                num_tokens += len(ids)
    return num_tokens


def gigatoken(job: Job) -> int:
    """gigatoken on the whole file at once, tokens to a file."""
    import gigatoken as giga

    source = giga.JsonlFileSource([job.input])
    tokens = giga.Tokenizer(job.tokenizer).encode_files(source)
    flat = np.asarray(tokens.layout.content.data).astype(np.uint16)
    flat.tofile(job.output)
    return len(flat) + len(tokens)


CANDIDATES: dict[str, Callable[[Job], int]] = {
    "ours, gigatoken": lambda job: ours(job, "gigatoken"),
    "ours, tokenizers": lambda job: ours(job, "tokenizers"),
    "Megatron preprocess": megatron,
    "encode_batch_fast loop": batch_loop,
    "gigatoken, whole file": gigatoken,
}
IMPORTS = {
    "ours, gigatoken": "data_tools.tokenize_text gigatoken",
    "ours, tokenizers": "data_tools.tokenize_text",
    "Megatron preprocess": "tokenizers torch megatron.core.datasets.indexed_dataset",
    "encode_batch_fast loop": "tokenizers",
    "gigatoken, whole file": "gigatoken awkward",
}
PEERS = ("Megatron preprocess", "encode_batch_fast loop", "gigatoken, whole file")


def run_here(name: str, job: Job) -> None:
    """Runs a candidate in this process; prints its cost as JSON."""
    for module in IMPORTS[name].split():
        __import__(module)
    stop, peaks = threading.Event(), [0]
    watcher = threading.Thread(target=_watch, args=(stop, peaks))
    watcher.start()
    start, cpu = time.perf_counter(), _cpu_seconds()
    tokens = CANDIDATES[name](job)
    cost = Cost(time.perf_counter() - start, _cpu_seconds() - cpu, tokens, 0)
    stop.set()
    watcher.join()
    print(json.dumps(cost._replace(peak=peaks[0])))


def _watch(stop: threading.Event, peaks: list[int]) -> None:
    me = psutil.Process()
    while not stop.wait(0.05):
        total = 0
        for process in (me, *me.children(recursive=True)):
            try:
                total += process.memory_full_info().pss
            except psutil.NoSuchProcess:
                continue
        peaks[0] = max(peaks[0], total)


def _cpu_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(options: argparse.Namespace) -> dict[str, list[Cost]]:
    """All candidates in turn, the order turned round every other time."""
    costs: dict[str, list[Cost]] = {name: [] for name in options.candidates}
    for repeat in range(options.repeats):
        for name in options.candidates if repeat % 2 == 0 else reversed(options.candidates):
            costs[name].append(run_apart(name, options))
    return costs


def run_apart(name: str, options: argparse.Namespace) -> Cost:
    """The cost of a candidate in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job(str(options.input), str(options.tokenizer), f"{folder}/out", options.workers)
        program = f"from benchmarks.data_write import *; run_here({name!r}, {job!r})"
        printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
        return Cost(*json.loads(printed.splitlines()[-1]))


def lines_of(costs: dict[str, list[Cost]]) -> Iterator[str]:
    """A table of medians, then the ratios of pairs."""
    from benchmarks.paired import median_ratio  # imports torch, which candidates need not hold

    for name, runs in costs.items():
        seconds, cpu, tokens, peak = (float(np.median([run[field] for run in runs])) for field in range(4))
        yield (
            f"{name:<24} {tokens / seconds / 1e6:7.2f} Mtok/s {tokens / cpu / 1e6:7.2f} Mtok per CPU-s "
            f"{peak / 1e6:7.0f} MB  {int(tokens)} tokens"
        )
    for mine in (name for name in ("ours, gigatoken", "ours, tokenizers") if name in costs):
        for theirs in (name for name in PEERS if name in costs):
            clock, cpu = (
                1 / median_ratio([run[field] for run in costs[mine]], [run[field] for run in costs[theirs]])
                for field in (0, 1)
            )
            memory = median_ratio([run.peak for run in costs[mine]], [run.peak for run in costs[theirs]])
            yield f"{mine} over {theirs}: speed {clock:.2f}, per CPU-second {cpu:.2f}, memory {memory:.2f}"


def library_sources(path: Path, megabytes: float) -> Path:
    """JSON lines of the standard library's files, over and over, up to a size."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(file for file in folder.rglob("*.py") if "site-packages" not in file.parts)
    with open(path, "w") as output:
        for file in itertools.cycle(files):
            output.write(json.dumps({"text": file.read_text(errors="replace")}) + "\n")
            if output.tell() >= megabytes * 1e6:
                return path
    raise FileNotFoundError(f"no Python files below {folder}")


def trained_tokenizer(path: Path, text: Path) -> Path:
    """A byte-level BPE of 16,384 tokens, trained on the first 4 MB."""
    from data_tools import train_tokenizer

    words = ["--input", str(text), "--output", str(path), "--vocab-size", "16384", "--max-bytes", "4000000"]
    assert train_tokenizer.main(words) == 0
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, help='JSON lines with "text"')
    parser.add_argument("--tokenizer", type=Path, help="a byte-level BPE's tokenizer.json of at most 65,536 tokens")
    parser.add_argument("--megabytes", type=float, default=50, help="of text without --input (default: %(default)s)")
    parser.add_argument(
        "--workers", type=int, help="(default: each candidate's own: ours by the input, Megatron's a core)"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--candidates", nargs="*", choices=list(CANDIDATES), default=list(CANDIDATES), metavar="NAME")
    options = parser.parse_args()
    from benchmarks.paired import describe_machine

    with tempfile.TemporaryDirectory() as folder:
        options.input = options.input or library_sources(Path(folder) / "text.jsonl", options.megabytes)
        options.tokenizer = options.tokenizer or trained_tokenizer(Path(folder) / "tokenizer.json", options.input)
        print(describe_machine("tokenizers", "gigatoken", "megatron-core"))
        print(f"{options.input.stat().st_size / 1e6:.0f} MB, {num_cores()} cores")
        for line in lines_of(measure(options)):
            print(line)


if __name__ == "__main__":
    main()
