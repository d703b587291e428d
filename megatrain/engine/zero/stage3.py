"""DeepSpeed's optimizer for ZeRO 3, which keeps a piece of each parameter on each rank."""

import torch.distributed as dist
from torch import nn

from megatrain.engine.zero.deepspeed_runtime import DeepSpeedRuntime
from megatrain.engine.zero.fragments import Fragment, Stage3Fragment
from megatrain.engine.zero.runtime import empty_moments


class Stage3Runtime(DeepSpeedRuntime):
    """``DeepSpeedZeroOptimizer_Stage3``."""

    def fragment(self, name: str, parameter: nn.Parameter) -> Fragment | None:
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        start = size * dist.get_rank(self.mesh.data_group)
        whole = parameter.ds_shape.numel()  # type: ignore[attr-defined]
        own = min(size, whole - start)  # the last rank's is padded
        return Stage3Fragment(name, parameter, start, own) if own > 0 else None

    def make_moments(self) -> None:
        group = self.base_optimizer.param_groups[0]  # all groups of such an optimizer have the same moments
        for flat in self.optimizer.fp32_partitioned_groups_flat:
            self.base_optimizer.state[flat] = empty_moments(flat, group)

    def finish_import(self) -> None:
        # an evaluation may have left weights whole, which would go on to be used as they were
        self.optimizer.parameter_offload.partition_all_parameters()
        if persistent := self.optimizer.persistent_parameters:  # small weights that ZeRO 3 keeps whole
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)
