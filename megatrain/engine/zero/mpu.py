"""What DeepSpeed asks about model parallelism, answered from our mesh."""

import torch.distributed as dist

from megatrain.parallel.mesh import Mesh


class MeshForDeepSpeed:
    """DeepSpeed's ``mpu``: its "model parallel" group is all ranks that hold one copy of the model
    (tensor x pipeline), so gradient norms and overflow flags are global; its tensor rank alone
    decides whether a replicated parameter counts in the norm.

    ``shards_data_parallel`` off (ZeRO 0): each rank is shown as its own data-parallel group, so DeepSpeed's
    ZeRO-1 optimizer shards nothing, and the engine sums the gradients of the replicas itself.
    DeepSpeed's optimizers without ZeRO count replicated parameters wrongly in the norm under a
    tensor or pipeline layout, and do not accumulate BF16 gradients in FP32.
    """

    def __init__(self, mesh: Mesh, shards_data_parallel: bool):
        self._mesh, self._sharded = mesh, shards_data_parallel

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        # a data-parallel group of one rank does not sum the norm over the experts: they count as model parallel
        return self._mesh.model_group if self._sharded else self._mesh.expert_model_group

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self.get_model_parallel_group())

    def get_model_parallel_world_size(self) -> int:
        return dist.get_world_size(self.get_model_parallel_group())

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.tp_group

    def get_tensor_model_parallel_rank(self) -> int:
        return self._mesh.coordinate("tp")

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._mesh.topology.tp

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._mesh.data_group if self._sharded else self._mesh.self_group

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.get_data_parallel_group())

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.get_data_parallel_group())
