"""Sums of gradients over ranks that no optimizer makes."""

import torch.distributed as dist
from torch import Tensor


def all_reduce_each(gradients: list[Tensor], group: dist.ProcessGroup) -> None:
    """Sums each gradient over ``group``, all under way at once."""
    if dist.get_world_size(group) == 1:
        return
    for work in [dist.all_reduce(gradient, group=group, async_op=True) for gradient in gradients]:
        work.wait()
