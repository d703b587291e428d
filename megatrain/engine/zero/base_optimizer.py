"""The optimizer that DeepSpeed shards and drives."""

import torch
from torch import nn

from megatrain.config.schema import ResolvedRun
from megatrain.engine.zero.import_once import import_deepspeed
from megatrain.optim.optimizer import Place, build_optimizer, parameter_groups
from megatrain.parallel.marks import marks_of
from megatrain.parallel.mesh import Mesh
from megatrain.spec import parts


def build_base_optimizer(
    parameters: list[tuple[str, nn.Parameter]], config: ResolvedRun, mesh: Mesh
) -> torch.optim.Optimizer:
    """The optimizer of ``config`` for this rank's parameters, given by canonical name."""
    table = parts.parameters(config.model)
    if config.optimizer.name != "cpu_adamw":
        shards = mesh.data_group if config.parallel.zero_stage > 0 else None
        return build_optimizer(parameters, config.optimizer, table, mesh.tp_group, shards, _place_of)
    import_deepspeed()
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(
        parameter_groups(parameters, config.optimizer, table, _place_of),
        lr=config.optimizer.lr,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.eps,
        adamw_mode=True,
    )


def _place_of(parameter: nn.Parameter) -> Place:
    marks = marks_of(parameter)
    return Place(marks.tensor_dim, marks.expert_group)
