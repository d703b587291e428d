"""What the benchmarks share: paired, interleaved timing, because machines are shared and noisy."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatrain.config.schema import ResolvedRun
from megatrain.data.feed.rows import Batch


def interleaved(
    candidates: Mapping[str, Callable[[], object]],
    repeats: int,
    clock: Callable[[], float] = time.process_time,
    before: Callable[[str], object] = lambda name: None,
) -> dict[str, list[float]]:
    """Seconds of each call: all candidates in turn, ``repeats`` times, the order turned round every other time.

    ``before`` each call, outside its time, what is given is called with the candidate's name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(repeats):
        for name in list(candidates) if repeat % 2 == 0 else reversed(list(candidates)):
            before(name)
            start = clock()
            candidates[name]()
            seconds[name].append(clock() - start)
    return seconds


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over the repeats of ours / theirs: what disturbed a pair disturbed both."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def quick_engine(config: ResolvedRun, device: torch.device) -> Any:
    """An engine whose random weights are drawn where they stay: a billion takes a host ten seconds."""
    from megatrain.train.build import build_engine

    def draw(name: str, shape: tuple[int, ...], model: Any, seed: int) -> Tensor:
        return torch.ones(shape, device=device) if len(shape) == 1 else torch.randn(shape, device=device) * 0.02

    with mock.patch("megatrain.models.initial._initial", draw):
        return build_engine(config, device)


def wait(device: torch.device) -> None:
    """Waits until ``device`` has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def describe_machine(*packages: str) -> str:
    """One line: device, threads, Python and the versions of ``packages``."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"{device}; Python {platform.python_version()}, {versions}"


def random_batch(config: ResolvedRun, device: torch.device) -> Batch:
    """A global batch of random tokens on ``device``."""
    shape = (config.train.global_batch_size, config.data.seq_len + 1)
    tokens = torch.randint(0, config.model.vocab_size, shape, device=device)
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.arange(shape[0]), None, torch.zeros(shape[0]).long())
