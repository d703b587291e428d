"""Tokens per second of mixtures of experts against the dense model of equal active FLOPs.

    python -m benchmarks.mixture                      on a GPU: BF16, torch.compile, two sizes of mixture
    python -m benchmarks.mixture --small --eager      anywhere

One process. The k experts of a token are together as wide as the dense feed-forward. Nothing is dropped, and the router
chooses as it does in training: tokens are random, the weights are trained from the start, with a balance loss. Whole
optimizer steps are timed, dense and mixture in turn, and the micro-batches' share of them by itself.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.paired import describe_machine, interleaved, median_ratio, quick_engine, random_batch, wait
from megatrain.config.load import load_config
from megatrain.config.schema import ResolvedRun
from megatrain.engine.engine import Engine
from megatrain.engine.start import start_distributed
from megatrain.spec.counts import num_parameters

SIZES = {
    False: {
        "num_layers": 4,
        "hidden_size": 2048,
        "attention.num_heads": 16,
        "feed_forward.hidden_size": 8192,
        "vocab_size": 32768,
    },
    True: {
        "num_layers": 2,
        "hidden_size": 64,
        "attention.num_heads": 4,
        "feed_forward.hidden_size": 256,
        "vocab_size": 512,
    },
}
MIXTURES = {(8, 2): 0.90, (64, 8): 0.75}  # (experts, of a token): goal
SEQ_LEN = {False: 2048, True: 64}


def run_config(small: bool, compiled: bool, micro_batches: int, **model: int) -> ResolvedRun:
    fields: dict[str, Any] = {f"model.{key}": value for key, value in {**SIZES[small], **model}.items()}
    fields |= {
        "model.family": "llama",
        "model.max_seq_len": SEQ_LEN[small],
        "data.seq_len": SEQ_LEN[small],
        "schedule.name": "constant",
    }
    fields |= {"train.micro_batch_size": 16, "train.global_batch_size": 16 * micro_batches}
    fields |= {"train.compile": str(compiled).lower(), "parallel.zero_stage": 1, "optimizer.lr": 1e-4}
    return load_config([], [f"--{key}={value}" for key, value in fields.items()], 1).with_derived(1).config


class Candidate:
    """An engine, and the seconds that its micro-batches took of each step."""

    def __init__(self, config: ResolvedRun, device: torch.device):
        self.device, self.batch, self.number = device, random_batch(config, device), 0
        self.engine: Engine = quick_engine(config, device)
        self.passes: list[float] = []
        run = self.engine._forward_backward

        def timed(*args: Any) -> Tensor:
            wait(device)
            start = time.perf_counter()
            losses = run(*args)
            wait(device)
            self.passes.append(time.perf_counter() - start)
            return losses

        self.engine._forward_backward = timed  # type: ignore[method-assign,assignment]

    def step(self) -> None:
        self.number += 1
        self.result = self.engine.train_step(self.batch, self.number)
        wait(self.device)

    def busiest(self) -> float:
        """Choices of the busiest expert of any layer, as a multiple of an even share."""
        assert self.result.routing is not None
        return max(max(layer["load"]) * len(layer["load"]) for layer in self.result.routing.read().values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--micro-batches", type=int, default=4)
    parser.add_argument("--small", action="store_true", help="a model for two CPU cores")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    options = parser.parse_args()
    device = start_distributed()
    print(describe_machine("torch", "deepspeed"))
    dense_config = run_config(options.small, not options.eager, options.micro_batches)
    tokens = dense_config.train.global_batch_size * SEQ_LEN[options.small]
    for (experts, chosen), goal in MIXTURES.items():
        width = SIZES[options.small]["feed_forward.hidden_size"] // chosen
        more = {"experts.num_experts": experts, "experts.per_token": chosen, "experts.hidden_size": width}
        config = run_config(options.small, not options.eager, options.micro_batches, **more)
        dense, mixture = Candidate(dense_config, device), Candidate(config, device)
        both = {"dense": dense.step, "mixture": mixture.step}
        interleaved(both, 3)
        dense.passes, mixture.passes = [], []
        seconds = interleaved(both, options.repeats, time.perf_counter)
        weights = [num_parameters(c.model) / 1e6 for c in (dense_config, config)]
        speeds = [tokens / statistics.median(seconds[name]) for name in both]
        ratio = median_ratio(seconds["dense"], seconds["mixture"])
        print(
            f"{experts} experts, {chosen} of a token ({weights[1]:,.0f}M weights, dense {weights[0]:,.0f}M): "
            f"{speeds[1]:,.0f} tokens/s, dense {speeds[0]:,.0f}; ratio {ratio:.3f} "
            f"(goal {goal}), of the micro-batches alone {median_ratio(dense.passes, mixture.passes):.3f}; "
            f"the busiest expert has {mixture.busiest():.2f} x its share",
            flush=True,
        )
        for candidate in (dense, mixture):
            candidate.engine.close()
        del dense, mixture, both, candidate
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
