"""Step time of the engine on one process against a loop written by hand in plain PyTorch.

    python -m benchmarks.step

Both train the same model from the same weights on the same batches, in turns, in FP32. The bare loop is
what a person would write for one process: forward, backward, clip, AdamW. On CPU the time is process time.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.paired import describe_machine, interleaved, median_ratio, random_batch
from megatrain.config.load import load_config
from megatrain.config.schema import ResolvedRun
from megatrain.data.feed.rows import Batch
from megatrain.engine.start import start_distributed
from megatrain.models.build import build_model
from megatrain.train.build import build_engine

SEQ_LEN, MICRO_BATCH_SIZE = 256, 4
OVERRIDES = [
    "--model.num_layers=6",
    "--model.hidden_size=384",
    "--model.attention.num_heads=6",
    "--precision.dtype=fp32",
    "--parallel.zero_stage=0",
    f"--data.seq_len={SEQ_LEN}",
    f"--train.micro_batch_size={MICRO_BATCH_SIZE}",
]


class BareLoop:
    """The hand-written loop. ``model`` returns logits [S, B, V]."""

    def __init__(self, model: nn.Module, config: ResolvedRun):
        self.model, self.config = model, config
        optimizer = config.optimizer
        decay = [p for p in model.parameters() if p.dim() >= 2]
        rest = [p for p in model.parameters() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": optimizer.weight_decay}, {"params": rest, "weight_decay": 0.0}],
            lr=optimizer.lr,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.eps,
            fused=True,
        )

    def step(self, batch: Batch) -> float:
        total = 0.0
        micro_batches = batch.tokens.split(MICRO_BATCH_SIZE)
        for tokens, labels in zip(micro_batches, batch.labels.split(MICRO_BATCH_SIZE), strict=True):
            logits = self.model(tokens).transpose(0, 1)
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten()) / len(micro_batches)
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def measure(config: ResolvedRun, device: torch.device, repeats: int) -> dict[str, list[float]]:
    engine = build_engine(config, device)
    bare = BareLoop(build_model(config.model, config.train.seed, device), config)
    batch = random_batch(config, device)
    steps = iter(range(1, 10**9))
    losses: dict[str, list[float]] = {"engine": [], "bare loop": []}
    candidates: dict[str, Callable[[], object]] = {
        "engine": lambda: losses["engine"].append(float(engine.train_step(batch, next(steps)).loss)),
        "bare loop": lambda: losses["bare loop"].append(bare.step(batch)),
    }
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    interleaved(candidates, 3)
    seconds = interleaved(candidates, repeats, clock)
    print(f"  losses: engine {losses['engine'][-1]:.4f}, bare loop {losses['bare loop'][-1]:.4f}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    device = start_distributed()
    print(describe_machine("torch", "deepspeed"))
    for family in ("gpt", "llama"):
        for micro_batches in (1, 4):
            batch_size = f"--train.global_batch_size={micro_batches * MICRO_BATCH_SIZE}"
            overrides = [*OVERRIDES, f"--model.family={family}", batch_size, "--schedule.name=constant"]
            print(f"{family}, {micro_batches} micro-batches of {MICRO_BATCH_SIZE} x {SEQ_LEN} tokens")
            seconds = measure(load_config([], overrides, 1).with_derived(1).config, device, options.repeats)
            ours, theirs = seconds["engine"], seconds["bare loop"]
            print(
                f"  engine {statistics.median(ours):.3f} s, bare loop {statistics.median(theirs):.3f} s, "
                f"ratio {median_ratio(ours, theirs):.3f}"
            )


if __name__ == "__main__":
    main()
