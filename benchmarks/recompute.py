"""Memory and time of every recompute mode.

    python -m benchmarks.recompute                    on a GPU: BF16
    python -m benchmarks.recompute --small            anywhere; memory is known on GPUs only

One process, a Llama of 0.6 billion weights, ZeRO 1, whole optimizer steps of two micro-batches. Memory: the most that
tensors held in a step, over what stands before it.
"""

import argparse
import gc
import statistics
import time
from typing import Any

import torch

from benchmarks.mixture import run_config
from benchmarks.paired import describe_machine, quick_engine, random_batch, wait
from megatrain.config.schema import ResolvedRun
from megatrain.engine.start import start_distributed

MODES: dict[str, dict[str, Any]] = {
    "none": {},
    "full": {"activation_checkpointing": "full"},
    "every_nth 2": {"activation_checkpointing": "every_nth", "checkpoint_every_nth": 2},
    "attention": {"activation_checkpointing": "attention"},
    "feed_forward": {"activation_checkpointing": "feed_forward"},
    **{
        f"budget {share}": {"activation_checkpointing": "budget", "activation_budget": share}
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    },
    "none, offloaded": {"offload_activations": True},
    "full, offloaded": {"activation_checkpointing": "full", "offload_activations": True},
    "none, compiled": {"compile": True},
    "full, compiled": {"activation_checkpointing": "full", "compile": True},
}


def measure(config: ResolvedRun, device: torch.device, repeats: int) -> tuple[float, float]:
    """(median seconds of a step, GB that a step takes at most over what stands before it)."""
    engine = quick_engine(config, device)
    batch = random_batch(config, device)
    seconds: list[float] = []
    more = 0
    for step in range(1, repeats + 3):
        wait(device)
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        start = time.perf_counter()
        engine.train_step(batch, step)
        wait(device)
        seconds.append(time.perf_counter() - start)
        more = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
    engine.close()
    return statistics.median(seconds[2:]), more / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--small", action="store_true", help="a model for two CPU cores")
    options = parser.parse_args()
    device = start_distributed()
    print(describe_machine("torch", "deepspeed"))
    print("mode | s a step | over none | GB over the state | of none's")
    plain: tuple[float, float] | None = None
    for mode in options.modes:
        config = run_config(options.small, False, 2, num_layers=2 if options.small else 8)
        train = config.train.model_copy(update=MODES[mode])
        seconds, memory = measure(config.model_copy(update={"train": train}), device, options.repeats)
        plain = plain or (seconds, memory)
        share = f"{memory / plain[1]:.3f}" if plain[1] else "-"
        print(f"{mode} | {seconds:.4f} | {seconds / plain[0]:.3f} | {memory:.2f} | {share}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
