"""The optimizer that DeepSpeed shards and drives."""

import torch
from torch import nn

from megatrain.config.schema import RunConfig
from megatrain.engine.zero.import_once import import_deepspeed
from megatrain.optim.optimizer import build_optimizer, parameter_groups
from megatrain.parallel.mesh import Mesh


def build_base_optimizer(
    parameters: list[tuple[str, nn.Parameter]], config: RunConfig, mesh: Mesh
) -> torch.optim.Optimizer:
    """The optimizer of ``config`` for this rank's parameters, given by canonical name."""
    if config.optimizer.name != "cpu_adamw":
        shards = mesh.data_group if config.parallel.zero_stage > 0 else None
        return build_optimizer(parameters, config.optimizer, mesh.tp_group, shards)
    import_deepspeed()
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(
        parameter_groups(parameters, config.optimizer),
        lr=config.optimizer.lr,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.eps,
        adamw_mode=True,
    )
