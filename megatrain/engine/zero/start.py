"""Who runs the model of a config: DeepSpeed's engine, with the adapter that its optimizer's class asks for."""

import contextlib
import io
from typing import Any

import torch
from torch import nn

from megatrain.config.deepspeed import deepspeed_config
from megatrain.config.schema import ResolvedRun
from megatrain.engine.errors import UnknownOptimizerError
from megatrain.engine.zero.base_optimizer import build_base_optimizer
from megatrain.engine.zero.compiled_operators import announce_compilations, free_locked_operators
from megatrain.engine.zero.cpu_fp16 import allow_fp16_on_cpus
from megatrain.engine.zero.deepspeed_runtime import DeepSpeedRuntime
from megatrain.engine.zero.experts import mark_dense_copies, mark_experts
from megatrain.engine.zero.import_once import import_deepspeed
from megatrain.engine.zero.mpu import MeshForDeepSpeed
from megatrain.engine.zero.partitions import BF16Runtime, Stage1And2Runtime
from megatrain.engine.zero.runtime import Moments, Named, Runtime
from megatrain.engine.zero.sharded import ShardedRuntime
from megatrain.engine.zero.stage3 import Stage3Runtime
from megatrain.engine.zero.whole import WholeRuntime, needs_no_deepspeed
from megatrain.parallel.mesh import Mesh

ADAPTERS: dict[str, type[DeepSpeedRuntime]] = {
    "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer": Stage1And2Runtime,
    "deepspeed.runtime.bf16_optimizer.BF16_Optimizer": BF16Runtime,
    "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3": Stage3Runtime,
}
"""By DeepSpeed's class of optimizer; their imports take seconds, so they are named."""


def start_runtime(model: nn.Module, parameters: Named, config: ResolvedRun, mesh: Mesh) -> Runtime:
    """Sets up the optimizer of ``config`` for this rank's ``parameters``. Collective over all ranks.

    Raises:
        UnknownOptimizerError: DeepSpeed drives it with a class that none of the adapters knows.
        OperatorLockError: a compilation that was killed left a lock.
    """
    sharded = config.parallel.zero_stage > 0
    if sharded:
        mark_experts(model, mesh)
    else:
        mark_dense_copies((p for _, p in parameters), mesh)
    if needs_no_deepspeed(config):
        base = build_base_optimizer(parameters, config, mesh)
        kind = ShardedRuntime if sharded and mesh.topology.data_size > 1 else WholeRuntime
        return kind(model, base, moments_of(base), config.optimizer.grad_clip, mesh)
    free_locked_operators(config)
    if mesh.rank == 0:
        announce_compilations(config)
    if config.precision.dtype == "fp16":
        allow_fp16_on_cpus()
    base = build_base_optimizer(parameters, config, mesh)
    moments = moments_of(base)
    with contextlib.redirect_stdout(io.StringIO()):  # memory reports that no log level silences
        deepspeed, *_ = import_deepspeed().initialize(
            model=model,
            optimizer=base,
            config=deepspeed_config(config),
            mpu=MeshForDeepSpeed(mesh, shards_data_parallel=sharded),
            dist_init_required=False,
        )
    runtime = adapter_of(deepspeed.optimizer)(deepspeed, mesh, moments)
    if config.precision.dtype == "fp16":
        runtime.scale_loss()
    if isinstance(runtime, BF16Runtime) and sharded and mesh.topology.ep > 1:
        mark_dense_copies((p for _, p in parameters), mesh)
        runtime.add_experts_to_norm(MeshForDeepSpeed(mesh, shards_data_parallel=False))
    return runtime


def moments_of(optimizer: torch.optim.Optimizer) -> Moments:
    """What ``optimizer`` will keep of each parameter; to be asked before DeepSpeed flattens its groups."""
    return {parameter: group["moments"] for group in optimizer.param_groups for parameter in group["params"]}


def adapter_of(optimizer: Any) -> type[DeepSpeedRuntime]:
    """The adapter for DeepSpeed's ``optimizer``, by its very class: a subclass may keep things elsewhere.

    Raises:
        UnknownOptimizerError: there is none.
    """
    name = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    if name not in ADAPTERS:
        raise UnknownOptimizerError(
            f"DeepSpeed drives this run with its optimizer {name}, which megatrain does not know; it knows "
            f"{', '.join(ADAPTERS)}. Leave out the keys of the config's section deepspeed that ask for it"
        )
    return ADAPTERS[name]
