"""Bytes that a rank sends in one training step, by layout, against what the arithmetic of the layout asks for.

    python -m benchmarks.wire --axes
    python -m benchmarks.wire --peers
    python -m benchmarks.wire --worlds 16 1024 10240

``--axes`` runs each axis alone on four processes of this machine; ``--worlds`` counts one rank of larger layouts, whose
other ranks are not started; ``--peers`` counts torch, DeepSpeed and megatron-core by themselves. The second step is
counted, as the first also agrees on shapes. Formulas: megatrain/plan/traffic.py, docs/benchmarks.md.
"""

import argparse
import multiprocessing
import os
import socket
import sys
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.paired import describe_machine, random_batch
from benchmarks.traffic import Traffic, start_fake_world
from benchmarks.wire_peers import PEERS, Peer
from megatrain.config.load import load_config
from megatrain.config.schema import ResolvedRun
from megatrain.plan.traffic import expected_bytes

RANKS, MICRO_BATCHES = 4, 2
CONTROL = 64 * 1024  # bytes of counts, norms and flags that a step may add to its formula
GOAL = 1.002
MODEL = {
    "family": "llama",
    "num_layers": 4,
    "hidden_size": 256,
    "attention.num_heads": 8,
    "attention.num_kv_heads": 4,
    "feed_forward.hidden_size": 512,
    "vocab_size": 1024,
}
SHARDED = {  # all weights, as in the formula: by default DeepSpeed keeps small ones whole, and up to 10^9 after a use
    "deepspeed.zero_optimization.stage3_param_persistence_threshold": 0,
    "deepspeed.zero_optimization.stage3_max_reuse_distance": 0,
    "deepspeed.zero_optimization.stage3_max_live_parameters": 0,
    "deepspeed.zero_optimization.stage3_prefetch_bucket_size": 0,
}
AXES: dict[str, dict[str, Any]] = {
    "DDP (ZeRO 0)": {"parallel.dp": 4},
    "ZeRO 1": {"parallel.dp": 4, "parallel.zero_stage": 1},
    "ZeRO 2": {"parallel.dp": 4, "parallel.zero_stage": 2},
    "ZeRO 3": {"parallel.dp": 4, "parallel.zero_stage": 3, **SHARDED},
    "tensor": {"parallel.tp": 4},
    "tensor, GPT": {"parallel.tp": 4, "model.family": "gpt"},
    "tensor + sequence": {"parallel.tp": 4, "parallel.sequence_parallel": True},
    "pipeline, 1f1b": {"parallel.pp": 4},
    "pipeline, zbv": {
        "parallel.pp": 4,
        "parallel.pp_schedule": "zbv",
        "parallel.stages_per_rank": 2,
        "model.num_layers": 8,
    },
    "pipeline, GPT, tied": {"parallel.pp": 4, "model.family": "gpt", "model.tie_embeddings": True},
    "context, all-gather": {"parallel.cp": 4},
    "context, Ulysses": {"parallel.cp": 4, "parallel.cp_method": "ulysses"},
    "experts": {"parallel.dp": 4, "parallel.ep": 4, "model.experts.num_experts": 8, "model.experts.per_token": 2},
    "experts, ZeRO 1": {
        "parallel.dp": 4,
        "parallel.ep": 2,
        "parallel.zero_stage": 1,
        "model.experts.num_experts": 8,
        "model.experts.per_token": 2,
    },
}
WIDE = {"model.attention.num_kv_heads": 8, "parallel.tp": 8, "parallel.sequence_parallel": True}
DEEP = {**WIDE, "model.num_layers": 16, "parallel.pp": 8}
WORLDS: dict[int, dict[str, Any]] = {
    16: {"parallel.tp": 4, "parallel.sequence_parallel": True, "parallel.dp": 4, "parallel.zero_stage": 1},
    64: {**WIDE, "parallel.dp": 8, "parallel.zero_stage": 3, **SHARDED},
    256: {"parallel.dp": 256, "parallel.zero_stage": 2},
    512: {**DEEP, "parallel.cp": 2, "parallel.dp": 4, "parallel.zero_stage": 1},
    1024: {**DEEP, "parallel.dp": 16, "parallel.zero_stage": 1},
    2048: {
        **WIDE,
        "parallel.dp": 256,
        "parallel.ep": 64,
        "model.experts.num_experts": 64,
        "model.experts.per_token": 8,
    },
    4096: {
        **DEEP,
        "model.attention.num_heads": 32,
        "model.attention.num_kv_heads": 32,
        "parallel.cp": 4,
        "parallel.cp_method": "ulysses",
        "parallel.dp": 16,
    },
    10240: {**DEEP, "parallel.dp": 160, "parallel.zero_stage": 1},
}


class Count(NamedTuple):
    """One rank's step: sent and expected bytes, calls, and both by part."""

    sent: float
    expected: float
    calls: int
    by_kind: dict[str, float]
    parts: dict[str, float]

    @property
    def excess(self) -> float:
        """Bytes beyond the formula and the control messages."""
        return self.sent - CONTROL - self.expected


class RoutedTraffic(Traffic):
    """Also counts the rows that experts exchange with other ranks: the layer says their numbers in integers first."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: list[tuple[Tensor, int]] = []  # of rows [ranks, experts], and this rank's place

    @property
    def rows(self) -> int:
        """Rows to and from other ranks; to be read when all communication is done."""
        return sum(int(counts.sum() - counts[rank].sum()) for counts, rank in self._counts)

    def count(self, operator: str, values: dict[str, Any]) -> None:
        super().count(operator, values)
        if operator == "alltoall_base_" and values["input"].dtype == torch.int64:
            rank = dist.get_rank(dist.ProcessGroup.unbox(values["process_group"]))
            self._counts += [(values["input"], rank), (values["output"], rank)]


def layout_config(overrides: dict[str, Any], micro_batches: int) -> ResolvedRun:
    """A resolved config of the model in FP32 with ``micro_batches`` of 2 x 256 tokens on each replica."""
    dp = overrides.get("parallel.dp", 1)
    fields = {f"model.{name}": value for name, value in MODEL.items()}
    fields |= {"data.seq_len": 256, "train.micro_batch_size": 2, "train.global_batch_size": 2 * micro_batches * dp}
    fields |= {"precision.dtype": "fp32", "parallel.zero_stage": 0, "parallel.dp": dp, **overrides}
    world = dp
    for axis in ("tp", "pp", "cp"):
        world *= fields.get(f"parallel.{axis}", 1)
    arguments = [f"--{name}={str(value).lower()}" for name, value in fields.items()]
    return load_config([], arguments, world).with_derived(world).config


def count_step(config: ResolvedRun) -> Count:
    """Counts this rank's second step."""
    from megatrain.train.build import build_engine

    engine = build_engine(config, torch.device("cpu"))
    share = config.train.global_batch_size // engine.mesh.topology.dp
    one = config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": share})})
    batch = random_batch(one, torch.device("cpu"))
    for step in (1, 2):
        with RoutedTraffic() as traffic:
            engine.train_step(batch, step)
    parts = expected_bytes(config, engine.mesh, engine.parameters, traffic.rows)
    engine.close()
    return Count(traffic.sent, sum(parts.values()), sum(traffic.calls.values()), kinds_of(traffic), parts)


def run_rank(rank: int, port: int, names: list[str]) -> dict[str, Count]:
    """All counts of one rank of four."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.manual_seed(rank)
    from megatrain.engine.start import start_distributed

    start_distributed()
    found = {}
    for name in names:
        found[name] = count_step(layout_config(AXES[name], 4 if "pipeline" in name else MICRO_BATCHES))
        if "megatrain.parallel.tensor" in sys.modules:
            sys.modules["megatrain.parallel.tensor"].forget_groups()
    return found


def count_axes(names: list[str]) -> dict[str, list[Count]]:
    """All ranks' counts, by axis."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with multiprocessing.get_context("spawn").Pool(RANKS) as pool:
        ranks = pool.starmap(run_rank, [(rank, port, names) for rank in range(RANKS)], chunksize=1)
    return {name: [found[name] for found in ranks] for name in names}


def count_world(size: int) -> Count:
    """Rank 0 of a world that is not started."""
    start_fake_world(size)
    config = layout_config(WORLDS[size], 16 if "parallel.pp" in WORLDS[size] else MICRO_BATCHES)
    return count_step(config)


def count_peer(axis: str, peer: Peer) -> Count:
    """A peer's rank 0 of four that are not started, against the formula of our axis."""
    from megatrain.models.build import build_stages
    from megatrain.parallel.mesh import build_mesh, topology_of
    from megatrain.train.build import build_layers

    start_fake_world(RANKS)
    config = layout_config(AXES[axis], MICRO_BATCHES)
    mesh = build_mesh(topology_of(config.parallel), torch.device("cpu"))
    blocks = [range(config.model.num_layers)]
    layers = build_layers(config, mesh)
    own = build_stages(config.model, layers, [0], blocks, 0, mesh.device, config.precision)[0]
    parts = expected_bytes(config, mesh, list(own.named_parameters()), 0)
    tokens = torch.randint(0, config.model.vocab_size, (MICRO_BATCHES, config.train.micro_batch_size, 257))
    traffic = peer(config, tokens)
    return Count(traffic.sent, sum(parts.values()), sum(traffic.calls.values()), kinds_of(traffic), parts)


def kinds_of(traffic: Traffic) -> dict[str, float]:
    return {f"{kind} over {group}": count for (group, kind), count in traffic.bytes.items()}


def print_count(name: str, counts: list[Count], details: bool) -> None:
    worst = max(counts, key=lambda count: count.excess / max(1.0, count.expected))
    met = worst.excess <= (GOAL - 1) * worst.expected
    print(
        f"{name} | {worst.expected / 1e6:.3f} | {worst.sent / 1e6:.3f} | {worst.sent / max(1.0, worst.expected):.4f} | "
        f"{(worst.sent - worst.expected) / 1024:.1f} | {worst.calls} | {'yes' if met else 'NO'}",
        flush=True,
    )
    if details:
        for part, count in [*worst.by_kind.items(), *(("expected: " + k, v) for k, v in worst.parts.items())]:
            print(f"    {part}: {count / 1e6:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="*", choices=list(AXES), help="these axes alone; all of them without a name")
    parser.add_argument("--worlds", nargs="*", type=int, choices=list(WORLDS), help="sizes of larger layouts")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), help="these peers; all of them without a name")
    parser.add_argument("--details", action="store_true", help="print the bytes of each kind and part")
    options = parser.parse_args()
    print(describe_machine("torch", "deepspeed", "megatron-core"))
    print("layout | formula MB | sent MB | ratio | over, KiB | calls | goal met")
    if options.axes is not None:
        for name, counts in count_axes(options.axes or list(AXES)).items():
            print_count(name, counts, options.details)
    for name in PEERS if options.peers == [] else options.peers or []:
        print_count(name, [count_peer(*PEERS[name])], options.details)
    for size in WORLDS if options.worlds == [] else options.worlds or []:
        print_count(f"{size} ranks", [count_world(size)], options.details)


if __name__ == "__main__":
    main()
