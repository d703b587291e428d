"""One training step of one rank, kept: what it is to compare two layouts of a config."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megatrain.checkpoint.placement import place
from megatrain.config.derive import num_tokens
from megatrain.config.schema import RunConfig
from megatrain.data.training import TrainingData
from megatrain.engine.engine import Engine, RankBatch
from megatrain.engine.kinds import WEIGHT
from megatrain.engine.state import export_state
from megatrain.models.decoder import Block, Embedding
from megatrain.parallel.context import build_context
from megatrain.train.build import build_engine


@dataclass(frozen=True)
class Part:
    """A part of a whole tensor: ``index`` says for each dim which places of the whole its own are."""

    values: np.ndarray
    index: list[np.ndarray]


@dataclass
class RankCapture:
    """What one rank computed in a step: tensors by (kind, canonical name), and numbers by name."""

    rank: int
    scalars: dict[str, float] = field(default_factory=dict)
    parts: dict[tuple[str, str], Part] = field(default_factory=dict)


ACTIVATION, GRADIENT = "activation", "gradient"


def comparable(config: RunConfig) -> RunConfig:
    """``config`` without gradient clipping: a wrong norm would show in every gradient."""
    optimizer = config.optimizer.model_copy(update={"grad_clip": 0.0})
    return config.model_copy(update={"optimizer": optimizer})


def capture_step(
    config: RunConfig, device: torch.device, change: Callable[[Engine], None] | None = None
) -> RankCapture:
    """Builds the engine and takes the first step on the run's first batch. Collective over all ranks.

    Activations are those at the borders of blocks. The gradient of a parameter is read off the optimizer's first
    moment, which after one step is that gradient times a constant: it is there in whole under every ZeRO stage.

    Args:
        change: called with the engine before the step; tests plant mistakes with it.
    """
    engine = build_engine(comparable(config), device)
    try:
        if change is not None:
            change(engine)
        batch = first_batch(config, engine)
        kept: defaultdict[str, list[Tensor]] = defaultdict(list)
        hooks = [hook for part in engine.model.parts for hook in _watch(part, kept)]
        result = engine.train_step(batch, 1)
        for hook in hooks:
            hook.remove()
        captured = RankCapture(engine.mesh.rank)
        captured.scalars = {
            "loss": float(result.loss),
            "skipped": float(result.skipped),
            "gradient norm": float(result.grad_norm),
        }
        for name, outputs in kept.items():
            captured.parts[ACTIVATION, name] = _activation(outputs, engine, batch)
        _add_state(captured, engine)
        return captured
    finally:
        engine.close()


def first_batch(config: RunConfig, engine: Engine) -> RankBatch:
    """This rank's share of the first batch of the run's data, or of random tokens where it names none."""
    size, dp_rank, dp = config.train.global_batch_size, engine.mesh.coordinate("dp"), engine.mesh.topology.dp
    if config.data.train:
        return TrainingData(config, num_tokens(config.model)).loader(dp_rank, dp).batch(0)
    generator = torch.Generator().manual_seed(config.data.seed)
    shape = (size, config.data.seq_len + 1)
    tokens = torch.randint(0, num_tokens(config.model), shape, generator=generator)
    labels = tokens[:, 1:].clone()
    for row in range(size):  # micro-batches with different numbers of loss tokens
        labels[row, : row * config.data.seq_len // (2 * size)] = -100
    own = slice(dp_rank * size // dp, (dp_rank + 1) * size // dp)
    return SimpleNamespace(  # type: ignore[return-value]
        tokens=tokens[own, :-1], labels=labels[own], sample_ids=torch.arange(size)[own], positions=None
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


def _activation(outputs: list[Tensor], engine: Engine, batch: RankBatch) -> Part:
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
    ids = batch.sample_ids.cpu().numpy()
    return Part(values, [positions.numpy(), ids, np.arange(values.shape[2])])


def _add_state(captured: RankCapture, engine: Engine) -> None:
    parameters = dict(engine.parameters)
    for kind, name, tensor in export_state(engine):
        if kind in (WEIGHT, "exp_avg"):
            starts = place(engine, parameters[name]).offset
            index = [np.arange(start, start + size) for start, size in zip(starts, tensor.shape, strict=True)]
            captured.parts[WEIGHT if kind == WEIGHT else GRADIENT, name] = Part(tensor.numpy(), index)
