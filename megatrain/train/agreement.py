"""What any rank knows and all must act on after the same step."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from megatrain.parallel.mesh import group_of


class Agreement:
    """Asks on all ranks, before a step, which of some flags are raised, and says after it which any rank has raised.

    The ranks talk while the step is computed, from host to host: nobody waits for a device, and hardly for anybody.
    A flag that is raised during a step is seen after the next one; in a world of one rank at once.

    Args:
        flags: this rank's, as they are now.
    """

    def __init__(self, flags: Callable[[], tuple[bool, ...]]):
        self._flags = flags
        everybody = list(range(dist.get_world_size()))
        self._group = group_of("agreement", everybody, backend="gloo")
        self._raised = torch.zeros(0, dtype=torch.int32)
        self._under_way: dist.Work | None = None

    def begin(self) -> None:
        """Tells the others this rank's flags. Collective."""
        if dist.get_world_size(self._group) > 1:
            self._raised = torch.tensor(self._flags(), dtype=torch.int32)
            self._under_way = dist.all_reduce(self._raised, dist.ReduceOp.MAX, self._group, async_op=True)

    def result(self) -> list[bool]:
        """Which flags any rank had raised at ``begin``. The same on every rank."""
        if self._under_way is None:
            return list(self._flags())
        self._under_way.wait()
        self._under_way = None
        return [bool(flag) for flag in self._raised.tolist()]
