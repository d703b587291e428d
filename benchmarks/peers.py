"""Step time of the engine against others' on the same shapes and batches, each in processes of its own.

    python -m benchmarks.peers                                  all cases
    python -m benchmarks.peers --cases "almost empty" --pairs 30
    python -m benchmarks.peers --peers "bare loop" torch         those whose name begins so

All candidates of a case are started, then make a step in turns, while the others wait: so none runs in a process that
another has changed, and what disturbs one pair disturbs both. Ratios are medians over the pairs, of the wall time (of
several ranks the slowest's) and of the CPU time of all ranks. FP32, on the CPU.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import IO, Any, NamedTuple

from benchmarks.paired import describe_machine, median_ratio

_SIZE = ["--model.num_layers=6", "--model.hidden_size=384", "--model.attention.num_heads=6", "--data.seq_len=256"]
_FP32 = ["--precision.dtype=fp32", "--schedule.name=constant", "--train.micro_batch_size=4"]
_EMPTY = [
    "--model.num_layers=1", "--model.hidden_size=32", "--model.attention.num_heads=2", "--model.vocab_size=64",
    "--data.seq_len=16",
]  # fmt: skip
_ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}
_LLAMA, _GPT = ["--model.family=llama"], ["--model.family=gpt"]


class Case(NamedTuple):
    """``overrides`` of the config, the number of ``ranks``, and the ``peers``."""

    overrides: list[str]
    ranks: int
    peers: tuple[str, ...]


_MEGATRON = ("megatron-core, fused attention", "megatron-core")
CASES = {
    "GPT, 1 micro-batch": Case([*_SIZE, *_FP32, *_GPT, "--train.global_batch_size=4"], 1, ("bare loop",)),
    "GPT, 4 micro-batches": Case([*_SIZE, *_FP32, *_GPT, "--train.global_batch_size=16"], 1, ("bare loop",)),
    "Llama, 1 micro-batch": Case(
        [*_SIZE, *_FP32, *_LLAMA, "--train.global_batch_size=4"],
        1,
        ("bare loop", *_MEGATRON, "transformers", "torchtitan"),
    ),
    "Llama, 4 micro-batches": Case([*_SIZE, *_FP32, *_LLAMA, "--train.global_batch_size=16"], 1, ("bare loop",)),
    "almost empty": Case([*_EMPTY, *_FP32, *_LLAMA, "--train.global_batch_size=4"], 1, ("bare loop",)),
    "tensor 2": Case([*_SIZE, *_FP32, *_LLAMA, "--train.global_batch_size=4", "--parallel.tp=2"], 2, _MEGATRON),
    "ZeRO 1 over two ranks": Case(
        [*_SIZE, *_FP32, *_LLAMA, "--train.global_batch_size=8", "--parallel.zero_stage=1"], 2, ("torch DDP",)
    ),
}


class Seconds(NamedTuple):
    wall: float
    cpu: float


class Candidate:
    """One peer's processes, which make a step when they are asked."""

    def __init__(self, name: str, case: Case):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        self.name, self.ranks = name, []
        for rank in range(case.ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.ranks)}
            place["LOCAL_WORLD_SIZE"] = str(case.ranks)
            command = [sys.executable, "-m", "benchmarks.peers", "--serve", name, *case.overrides]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self.ranks.append(subprocess.Popen(command, env={**os.environ, **address, **place, **_ON_CPU}, **pipes))
        self.losses: list[float] = []
        self._ask("")  # until all are ready

    def step(self) -> Seconds:
        told = self._ask("step\n")
        self.losses.append(told[0]["loss"])
        return Seconds(max(rank["wall"] for rank in told), sum(rank["cpu"] for rank in told))

    def _ask(self, what: str) -> list[dict[str, float]]:
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.write(what)
            rank.stdin.flush()
        answers = [rank.stdout.readline() for rank in self.ranks if rank.stdout is not None]
        if not all(answers):
            raise RuntimeError(f"{self.name} ended; what it said stands above")
        return [json.loads(answer) for answer in answers]

    def close(self) -> None:
        for rank in self.ranks:
            assert rank.stdin is not None
            rank.stdin.close()
        for rank in self.ranks:
            rank.wait(60)


def serve(name: str, overrides: list[str], answers: IO[str]) -> None:
    """Makes a step for each line of standard input and answers with what it took."""
    import torch

    from benchmarks.paired import random_batch
    from benchmarks.peer_models import PEERS
    from megatrain.config.load import load_config

    world_size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world_size))
    config = load_config([], overrides, world_size).with_derived(world_size).config
    torch.manual_seed(config.train.seed)
    step = PEERS[name](config)
    torch.manual_seed(0)
    batch = random_batch(config, torch.device("cpu"))
    dp = config.parallel.dp
    own = slice(rank % dp * (len(batch.tokens) // dp), (rank % dp + 1) * (len(batch.tokens) // dp))
    batch = batch._replace(tokens=batch.tokens[own], labels=batch.labels[own], sample_ids=batch.sample_ids[own])
    answer: dict[str, float] = {}
    while True:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if not sys.stdin.readline():
            return
        wall, cpu = time.perf_counter(), time.process_time()
        loss = float(step(batch))
        answer = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "loss": loss}


def measure(case: Case, peers: list[str], pairs: int) -> None:
    candidates = {name: Candidate(name, case) for name in ("engine", *peers)}
    seconds: dict[str, list[Seconds]] = {name: [] for name in candidates}
    for pair in range(3 + pairs):
        for name in list(candidates) if pair % 2 else reversed(list(candidates)):
            taken = candidates[name].step()
            if pair >= 3:  # what comes before warms up
                seconds[name].append(taken)
    for name, candidate in candidates.items():
        candidate.close()
        wall, cpu = ([getattr(s, clock) for s in seconds[name]] for clock in Seconds._fields)
        line = f"  {name:<32} wall {1e3 * statistics.median(wall):8.1f} ms, CPU {1e3 * statistics.median(cpu):8.1f} ms"
        if name != "engine":
            ours = seconds["engine"]
            line += f"; engine's {median_ratio([s.wall for s in ours], wall):.3f} of it, "
            line += f"CPU {median_ratio([s.cpu for s in ours], cpu):.3f}"
        print(f"{line}; loss {candidate.losses[0]:.4f} -> {candidate.losses[-1]:.4f}", flush=True)


def _lacking(peer: str) -> bool:
    """Whether ``peer`` is a package that is not installed."""
    return peer in ("transformers", "torchtitan") and find_spec(peer) is None


def _versions() -> str:
    found = []
    for package in ("transformers", "megatron-core", "torchtitan"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} " + ("not installed, so not measured" if _lacking(package) else "of a folder"))
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--peers", nargs="+", default=[""], help="only those whose name begins so")
    options = parser.parse_args()
    print(f"{describe_machine('torch', 'deepspeed')}, {_versions()}")
    for name in options.cases:
        case = CASES[name]
        peers = [peer for peer in case.peers if any(peer.startswith(begin) for begin in options.peers)]
        print(f"{name} ({case.ranks} process{'es' if case.ranks > 1 else ''})", flush=True)
        measure(case, [peer for peer in peers if not _lacking(peer)], options.pairs)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print is no answer
        serve(sys.argv[2], sys.argv[3:], answers)
    else:
        main()
