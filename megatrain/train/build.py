"""From a resolved config to a running engine."""

import difflib
import fnmatch
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from megatrain.config.pipeline_schedules import PIPELINE_SCHEDULES
from megatrain.config.reading.problems import ConfigError, Problem
from megatrain.config.schema import ResolvedRun
from megatrain.config.stages import own_stages, stage_blocks
from megatrain.engine.engine import Engine
from megatrain.models.build import build_stages
from megatrain.models.compiled import compile_blocks
from megatrain.models.recompute import apply_recompute
from megatrain.parallel.context import build_context
from megatrain.parallel.layers import Layers
from megatrain.parallel.mesh import Mesh, build_mesh, topology_of

_SPLITS_BACKWARD = "2.12"
"""The oldest torch that runs the schedules which split the backward pass: 2.12.1 does, 2.11 does not."""


def build_layers(config: ResolvedRun, mesh: Mesh) -> Layers:
    """Plain layers on one tensor rank; megatron-core's, whose import takes seconds, on several."""
    context = build_context(config.parallel, mesh)
    expert_group = mesh.ep_group if mesh.topology.ep > 1 else None
    if mesh.topology.tp == 1:
        return Layers(context, expert_group)
    from megatrain.parallel.tensor import TensorParallelLayers

    return TensorParallelLayers(mesh, config.parallel.sequence_parallel, context, expert_group)


def build_engine(config: ResolvedRun, device: torch.device) -> Engine:
    """Groups, this rank's part of the model, and the engine. Collective over all ranks.

    Raises:
        ConfigError: the device has no such kernel, or this torch no such schedule.
    """
    _require_kernel(config.model.attention.documents, device)
    _require_torch(config.parallel.pp_schedule)
    parallel = config.parallel
    mesh = build_mesh(topology_of(parallel), device)
    parts = build_stages(
        config.model,
        build_layers(config, mesh),
        own_stages(parallel, mesh.coordinate("pp")),
        stage_blocks(config),
        config.train.seed,
        device,
        config.precision,
    )
    _require_rules_that_fit(config, parts)
    if config.train.compile and mesh.rank == 0:
        print("compiling the blocks (train.compile): the first step may take minutes", flush=True)
    for part in parts:
        apply_recompute(part, config.train)
        problem = compile_blocks(part) if config.train.compile else None
        if problem and mesh.rank == 0:
            print(f"torch.compile does not work here, so blocks run as they are: {problem}", flush=True)
    return Engine(config, mesh, list(parts))


def _require_rules_that_fit(config: ResolvedRun, parts: Sequence[nn.Module]) -> None:
    """Each pattern of ``optimizer.rules`` fits a parameter on some rank. Collective where there are rules."""
    rules = config.optimizer.rules
    if not rules:
        return
    by_rank: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(by_rank, [name for part in parts for name, _ in part.named_parameters()])
    names = sorted({name for own in by_rank for name in own})
    problems = []
    for number, rule in enumerate(rules):
        if not fnmatch.filter(names, rule.pattern):
            near = difflib.get_close_matches(rule.pattern, names, 3, 0.0)
            text = "fits no parameter of this model, so the rule has no effect"
            cure = f"write a canonical name, with * for any text, such as {', '.join(near)}; or leave the rule out"
            allowed = "patterns of names that are there"
            problems.append(Problem(f"optimizer.rules.{number}.pattern", rule.pattern, text, allowed, cure))
    if problems:
        raise ConfigError(problems)


def _require_kernel(document_attention: str, device: torch.device) -> None:
    if document_attention in ("flex", "varlen") and device.type != "cuda":
        cure = "set it to per_document or dense"
        allowed = "on CPUs per_document or dense"
        problem = Problem("model.attention.documents", document_attention, "trains on GPUs only", allowed, cure)
        raise ConfigError([problem])


def _require_torch(schedule: str) -> None:
    if PIPELINE_SCHEDULES[schedule].splits_backward and torch.__version__ < _SPLITS_BACKWARD:
        complaint = f"needs torch {_SPLITS_BACKWARD} or newer to split the backward pass; this is {torch.__version__}"
        allowed = ", ".join(name for name, one in PIPELINE_SCHEDULES.items() if not one.splits_backward)
        cure = f"install torch {_SPLITS_BACKWARD}, or set one of these"
        raise ConfigError([Problem("parallel.pp_schedule", schedule, complaint, allowed, cure)])
