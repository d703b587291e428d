"""What `train.deterministic` costs: steps of one engine with torch's deterministic kernels and without, in turns.

    python -m benchmarks.deterministic

Both have the same threads, and on a GPU the same cuBLAS workspaces. On CPU the time is process time.
"""

import argparse
import statistics
import time

import torch

from benchmarks.paired import describe_machine, interleaved, median_ratio, random_batch, wait
from megatrain.config.load import load_config
from megatrain.engine.start import start_distributed
from megatrain.train.build import build_engine

MODELS = {
    "GPT with dropout": ["--model.family=gpt", "--model.dropout=0.1"],
    "Llama": ["--model.family=llama"],
    "mixture of 8 experts": [
        *("--model.family=llama", "--model.experts.num_experts=8", "--model.experts.per_token=2"),
        *("--model.experts.hidden_size=384", "--model.experts.capacity=1.25"),
    ],
}
OVERRIDES = [
    *("--model.num_layers=6", "--model.hidden_size=384", "--model.attention.num_heads=6", "--data.seq_len=256"),
    *("--train.global_batch_size=4", "--train.micro_batch_size=4", "--train.deterministic=true"),
    *("--parallel.zero_stage=1", "--schedule.name=constant"),
]


def measure(overrides: list[str], device: torch.device, repeats: int) -> dict[str, list[float]]:
    config = load_config([], [*OVERRIDES, *overrides], 1).with_derived(1).config
    engine = build_engine(config, device)
    batch = random_batch(config, device)
    steps = iter(range(1, 10**9))

    def step() -> None:
        engine.train_step(batch, next(steps))
        wait(device)

    clock = time.perf_counter if device.type == "cuda" else time.process_time
    candidates = dict.fromkeys(("deterministic", "as it comes"), step)

    def choose(name: str) -> None:
        torch.use_deterministic_algorithms(name == "deterministic")

    interleaved(candidates, 2, clock, choose)
    try:
        return interleaved(candidates, repeats, clock, choose)
    finally:
        engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", default="fp32")
    options = parser.parse_args()
    device = start_distributed(deterministic=True)
    print(describe_machine("torch", "deepspeed"))
    for name, overrides in MODELS.items():
        seconds = measure([*overrides, f"--precision.dtype={options.dtype}"], device, options.repeats)
        ours, theirs = seconds["deterministic"], seconds["as it comes"]
        print(
            f"{name}: deterministic {statistics.median(ours):.3f} s, as it comes {statistics.median(theirs):.3f} s, "
            f"ratio {median_ratio(ours, theirs):.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
