"""Tokens per second and MFU of a 124M GPT, against the matrix products that the device can do at most.

    python -m benchmarks.throughput                                     on a GPU: BF16, torch.compile
    python -m benchmarks.throughput --batch 2 --steps 3 --eager         anywhere

One process. MFU counts 6 N + 12 L D S operations a token (Chowdhery et al. 2022, appendix B) against the device's
peak; the ceiling is a square BF16 product timed between the steps of the same run.
"""

import argparse
import statistics
import time

import torch

from benchmarks.paired import describe_machine, random_batch
from megatrain.config.derive import flops_per_token
from megatrain.config.load import load_config
from megatrain.engine.start import start_distributed
from megatrain.train.build import build_engine
from megatrain.train.throughput import Hardware, peak_flops

SEQ_LEN = 1024
MODEL = ["--model.family=gpt", "--model.num_layers=12", "--model.hidden_size=768", "--model.num_heads=12"]


def gemm_flops(device: torch.device, size: int) -> float:
    """Operations per second of one square BF16 product."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    _wait(device)
    start = time.perf_counter()
    a @ a
    _wait(device)
    return 2 * size**3 / (time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="sequences of 1,024 tokens in a step, one micro-batch")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    options = parser.parse_args()
    device = start_distributed()
    batch_size = [f"--train.global_batch_size={options.batch}", f"--train.micro_batch_size={options.batch}"]
    compiled = f"--train.compile={'false' if options.eager else 'true'}"
    # 50,304: GPT-2's 50,257 tokens, rounded up to a multiple of 128
    overrides = [*MODEL, *batch_size, compiled, "--model.vocab_size=50304", f"--data.seq_len={SEQ_LEN}"]
    config = load_config([], [*overrides, "--parallel.zero_stage=0", "--schedule.name=constant"], 1)
    resolved = config.with_derived(1).config
    engine = build_engine(resolved, device)
    batch = random_batch(resolved, device)
    num_warmup, size = 3, 8192 if device.type == "cuda" else 1024
    seconds, gemm = [], []
    for step in range(1, num_warmup + options.steps + 1):
        start = time.perf_counter()
        float(engine.train_step(batch, step).loss)
        seconds.append(time.perf_counter() - start)
        gemm.append(gemm_flops(device, size))
    per_second = options.batch * SEQ_LEN / statistics.median(seconds[num_warmup:])
    flops = flops_per_token(resolved.model, SEQ_LEN)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    mfu = Hardware(1, peak_flops(name, "bf16")).mfu(flops, per_second)
    ceiling = statistics.median(gemm[num_warmup:])
    print(describe_machine("torch", "deepspeed"))
    print(
        f"{per_second:,.0f} tokens/s, MFU {'unknown' if mfu is None else f'{mfu:.1%}'}, product of {size}: "
        f"{ceiling / 1e12:.2f}e12 operations/s, of which the model's are {flops * per_second / ceiling:.1%}"
    )


if __name__ == "__main__":
    main()
