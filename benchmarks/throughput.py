"""Tokens per second and MFU of a 124M GPT, against the matrix products that the device can do at most.

    python -m benchmarks.throughput                                     on a GPU: BF16, torch.compile
    python -m benchmarks.throughput --dtypes bf16 fp16                  both, in turns
    python -m benchmarks.throughput --batch 2 --steps 3 --eager         anywhere

One process. MFU counts 6 N + 12 L D S operations a token (Chowdhery et al. 2022, appendix B; N: the weights of the
matrices, no table that is looked up) against the device's peak; the ceiling is a square BF16 product timed between the
steps of the same run.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.paired import describe_machine, interleaved, median_ratio, random_batch, wait
from megatrain.config.load import load_config
from megatrain.config.schema import ResolvedRun
from megatrain.engine.start import start_distributed
from megatrain.record.throughput import Hardware, peak_flops
from megatrain.spec.counts import flops_per_token
from megatrain.train.build import build_engine

SEQ_LEN = 1024
MODEL = ["--model.family=gpt", "--model.num_layers=12", "--model.hidden_size=768", "--model.attention.num_heads=12"]


def gemm_flops(device: torch.device, size: int) -> float:
    """Operations per second of one square BF16 product."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    wait(device)
    start = time.perf_counter()
    a @ a
    wait(device)
    return 2 * size**3 / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="sequences of 1,024 tokens in a step, one micro-batch")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    options = parser.parse_args()
    device = start_distributed()
    print(describe_machine("torch", "deepspeed"))
    num_warmup, size = 3, 8192 if device.type == "cuda" else 1024
    gemm: list[float] = []
    steps = {dtype: stepper(options, dtype, device) for dtype in options.dtypes}
    interleaved(steps, num_warmup)
    seconds = interleaved(steps, options.steps, time.perf_counter, lambda _: gemm.append(gemm_flops(device, size)))
    flops = flops_per_token(model_config(options, "bf16").model, SEQ_LEN)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    ceiling = statistics.median(gemm)
    for dtype, taken in seconds.items():
        per_second = options.batch * SEQ_LEN / statistics.median(taken)
        share = Hardware(1, peak_flops(name, dtype)).mfu(flops * per_second)
        mfu = "unknown" if share is None else f"{share:.1%}"
        print(
            f"{dtype}: {per_second:,.0f} tokens/s, MFU {mfu}, product of {size}: "
            f"{ceiling / 1e12:.2f}e12 operations/s, of which the model's are {flops * per_second / ceiling:.1%}; "
            f"time of a step over {options.dtypes[0]}'s {median_ratio(taken, seconds[options.dtypes[0]]):.3f}"
        )


def model_config(options: argparse.Namespace, dtype: str) -> ResolvedRun:
    batch_size = [f"--train.global_batch_size={options.batch}", f"--train.micro_batch_size={options.batch}"]
    compiled = f"--train.compile={'false' if options.eager else 'true'}"
    # 50,304: GPT-2's 50,257 tokens, rounded up to a multiple of 128
    overrides = [*MODEL, *batch_size, compiled, "--model.vocab_size=50304", f"--data.seq_len={SEQ_LEN}"]
    overrides += [f"--precision.dtype={dtype}", "--parallel.zero_stage=0", "--schedule.name=constant"]
    return load_config([], overrides, 1).with_derived(1).config


def stepper(options: argparse.Namespace, dtype: str, device: torch.device) -> Callable[[], float]:
    """A training step of an engine of its own."""
    config = model_config(options, dtype)
    engine, batch, numbers = build_engine(config, device), random_batch(config, device), itertools.count(1)
    return lambda: float(engine.train_step(batch, next(numbers)).loss)


if __name__ == "__main__":
    main()
