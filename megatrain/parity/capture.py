"""The first training steps of one rank, kept: what it is to compare two layouts of a config."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megatrain.checkpoint.placement import placement_of
from megatrain.config.schema import ResolvedRun
from megatrain.data.feed.training import TrainingData
from megatrain.engine.engine import Engine, RankBatch, StepResult
from megatrain.engine.state import export_state, factors
from megatrain.models.block import Block
from megatrain.models.ends import Embedding
from megatrain.parallel.context import build_context
from megatrain.parallel.marks import partition_dim
from megatrain.parity.noise import disturb
from megatrain.spec.derive import num_tokens
from megatrain.spec.kinds import WEIGHT
from megatrain.spec.labels import IGNORE
from megatrain.train.build import build_engine


@dataclass(frozen=True)
class TensorPart:
    """A part of a whole tensor: ``index`` says for each dim which places of the whole its own are."""

    values: np.ndarray
    index: list[np.ndarray]


Key = tuple[int, str, str]
"""Step (0: before the first), kind, canonical name."""


@dataclass
class RankCapture:
    """What one rank computed: tensors by step, kind and canonical name, and numbers by step and name.

    ``sum_eps``: largest relative rounding of the type that gradients are summed in.
    """

    rank: int
    sum_eps: float
    scalars: dict[tuple[int, str], float] = field(default_factory=dict)
    parts: dict[Key, TensorPart] = field(default_factory=dict)


STEPS = 3
ACTIVATION, GRADIENT, UPDATE, BIAS = "activation", "gradient", "update", "balance bias"
CONTRIBUTION = "contribution"
"""Sum of what this rank's backward passes gave: the gradient is the sum of all ranks'."""
_ROUNDING = {"fp32": 2.0**-24, "bf16": 2.0**-9, "fp16": 2.0**-12}


def comparable(config: ResolvedRun) -> ResolvedRun:
    """``config`` for steps in which mistakes show: without a warm-up, whose first steps are too small to tell a decay
    from rounding. ``capture_steps`` clips from the second step on."""
    schedule = config.schedule.model_copy(update={"warmup_steps": 0})
    return config.model_copy(update={"schedule": schedule})


def capture_steps(
    config: ResolvedRun,
    device: torch.device,
    change: Callable[[Engine], None] | None = None,
    draw: int = 0,
    steps: int = STEPS,
) -> RankCapture:
    """Builds the engine and takes the first steps on the run's first batches. Collective over all ranks.

    The gradient of the first step is read off the optimizer's first moment, which then is that gradient times a
    constant: it is there in whole under every ZeRO stage. So that step is not clipped; those that follow are, to half
    the first one's norm (where the config clips at all).

    Args:
        change: called with the engine before the first step; tests plant mistakes with it.
        draw: above 0, every result is disturbed by one rounding (parity_noise.py), each draw by other ones.
        steps: how many; fewer than the reference's are compared with its first.
    """
    engine = build_engine(comparable(plain(config) if draw else config), device)
    try:
        if draw:
            disturb(engine, draw)
        captured = RankCapture(engine.mesh.rank, _ROUNDING[_sum_dtype(config)])
        before = _add_state(captured, engine, 0, {})
        if change is not None:
            change(engine)
        clip, engine.runtime.clip_norm = engine.runtime.clip_norm, 0.0
        for step in range(1, steps + 1):
            result = _captured_step(captured, engine, step)
            before = _add_state(captured, engine, step, before)
            if step == 1 and clip and not result.skipped:
                engine.runtime.clip_norm = min(clip, float(result.grad_norm) / 2)
        return captured
    finally:
        engine.close()


def plain(config: ResolvedRun) -> ResolvedRun:
    """``config`` with blocks that run as they are, once: noise has no place in a compiled or a repeated one."""
    train = config.train.model_copy(update={"compile": False, "activation_checkpointing": "none"})
    return config.model_copy(update={"train": train})


def _sum_dtype(config: ResolvedRun) -> str:
    return "fp32" if config.precision.gradient_dtype == "fp32" else config.precision.dtype


def _captured_step(captured: RankCapture, engine: Engine, step: int) -> StepResult:
    batch = batch_of(engine.config, engine, step)
    kept: defaultdict[str, list[Tensor]] = defaultdict(list)
    sums: dict[str, Tensor] = {}
    hooks = [hook for part in engine.model.parts for hook in _watch(part, kept)]
    if step == 1:
        hooks += _watch_gradients(engine, sums)
    result = engine.train_step(batch, step)
    for hook in hooks:
        hook.remove()
    captured.scalars |= {
        (step, "skipped"): float(result.skipped),
        (step, "loss scale"): result.loss_scale,
        (step, "loss"): float(result.loss),
        (step, "gradient norm"): float(result.grad_norm),
    }
    for name, outputs in kept.items():
        captured.parts[step, ACTIVATION, name] = _activation(outputs, engine, batch)
    for name, total in sums.items():
        captured.parts[step, CONTRIBUTION, name] = _part(engine, name, total)
    return result


def batch_of(config: ResolvedRun, engine: Engine, step: int) -> RankBatch:
    """This rank's share of a step's batch of the run's data, or of random tokens where it names none."""
    size, dp_rank, dp = config.train.global_batch_size, engine.mesh.coordinate("dp"), engine.mesh.topology.dp
    if config.data.train:
        return TrainingData(config, num_tokens(config.model)).loader(dp_rank, dp).batch(step - 1)
    generator = torch.Generator().manual_seed(config.data.seed + step)
    shape = (size, config.data.seq_len + 1)
    tokens = torch.randint(0, num_tokens(config.model), shape, generator=generator)
    labels = tokens[:, 1:].clone()
    for row in range(size):  # micro-batches with different numbers of loss tokens
        labels[row, : row * config.data.seq_len // (2 * size)] = IGNORE
    own = slice(dp_rank * size // dp, (dp_rank + 1) * size // dp)
    return SimpleNamespace(  # type: ignore[return-value]
        tokens=tokens[own, :-1],
        labels=labels[own],
        sample_ids=torch.arange(size)[own] + step * size,
        positions=None,
        lengths=None,
    )


def _watch(part: nn.Module, kept: dict[str, list[Tensor]]) -> list[Any]:
    def keep(name: str) -> Callable[..., None]:
        @torch.compiler.disable  # a compiled block would be traced for each list of outputs anew
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            kept[name].append(output.detach().float().cpu())

        return hook

    return [
        module.register_forward_hook(keep(name))
        for name, module in part.named_modules()
        if isinstance(module, Block | Embedding)
    ]


def _watch_gradients(engine: Engine, sums: dict[str, Tensor]) -> list[Any]:
    """Adds up what each backward pass gives, in float64; of what tensor ranks hold alike, only the first one's."""

    def add(name: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            sums[name] = sums[name] + gradient.detach().double() if name in sums else gradient.detach().double()

        return hook

    first = engine.mesh.coordinate("tp") == 0
    return [p.register_hook(add(name)) for name, p in engine.parameters if first or partition_dim(p) is not None]


def _activation(outputs: list[Tensor], engine: Engine, batch: RankBatch) -> TensorPart:
    """All micro-batches of a border, [S, N, D]: this rank's positions of its sequences."""
    num_micro_batches = len(batch.sample_ids) // engine.config.train.micro_batch_size
    outputs = outputs[-num_micro_batches:]  # a pipeline runs once more before, to see the shapes
    values = torch.cat(outputs, dim=1).numpy()
    missing = len(batch.sample_ids) - values.shape[1]
    values = np.pad(values, [(0, 0), (0, missing), (0, 0)], constant_values=np.nan)  # sequences that never ran
    parallel, mesh = engine.config.parallel, engine.mesh
    positions = build_context(parallel, mesh).positions(batch.tokens.shape[1] // mesh.topology.cp).cpu()
    if parallel.sequence_parallel:
        positions = positions.chunk(mesh.topology.tp)[mesh.coordinate("tp")]
    rows = mesh.coordinate("dp") * len(batch.sample_ids) + np.arange(len(batch.sample_ids))
    return TensorPart(values, [positions.numpy(), rows, np.arange(values.shape[2])])


def _part(engine: Engine, name: str, tensor: Tensor) -> TensorPart:
    starts = placement_of(engine, dict(engine.parameters)[name]).offset
    index = [np.arange(start, start + size) for start, size in zip(starts, tensor.shape, strict=True)]
    return TensorPart(tensor.float().cpu().numpy(), index)


def _add_state(captured: RankCapture, engine: Engine, step: int, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adds the state after ``step``, and the updates since the weights ``before``; returns the weights."""
    weights, parameters = {}, dict(engine.parameters)
    for kind, name, tensor in export_state(engine):
        if kind == WEIGHT:
            weights[name] = tensor.clone()
            if step:
                captured.parts[step, UPDATE, name] = _part(engine, name, tensor.double() - before[name].double())
                continue
        elif not step:
            continue
        elif kind == "exp_avg" and step == 1:
            kind, tensor = GRADIENT, tensor / _share(engine.config, engine.moments[parameters[name]])
        captured.parts[step, kind, name] = _part(engine, name, tensor.clone())
    for (kind, name), values in factors(engine).items() if step else ():
        whole = values.detach().float().cpu().clone().numpy()
        captured.parts[step, kind, name] = TensorPart(whole, [np.arange(len(whole))])
    if step and engine.config.model.router.balance_rate and engine.routers.layers:
        biases = engine.routers.biases.cpu().clone().numpy()
        captured.parts[step, BIAS, "routers"] = TensorPart(biases, [np.arange(size) for size in biases.shape])
    return weights


def _share(config: ResolvedRun, moments: tuple[str, ...]) -> float:
    """The part of the first step's gradient that goes into the first moment."""
    optimizer = config.optimizer
    if optimizer.name == "lion":
        return 1 - optimizer.beta2
    orthogonal = optimizer.name == "muon" and len(moments) == 1
    return 1 - (optimizer.muon_momentum if orthogonal else optimizer.beta1)
