"""Where a rank is: pure arithmetic over the mesh, without processes.

Ranks are numbered with the tensor axis fastest and the pipeline axis slowest, the order of
megatron-core (``tp-cp-ep-dp-pp``).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

AXES = ("tp", "cp", "dp", "pp")  # fastest first
EXPERT_AXES = ("tp", "ep", "edp", "pp")  # the same ranks as the experts see them


@dataclass(frozen=True)
class Topology:
    """Sizes of the axes. ``world_size`` ranks stand at the points of a tp x cp x dp x pp grid.

    The cp x dp ranks that hold the same dense weights are shared out anew for the experts: runs of ``ep``
    of them hold all experts, and ``edp`` such runs hold copies.

    Raises:
        ValueError: ``ep`` does not divide cp x dp.
    """

    tp: int = 1
    cp: int = 1
    dp: int = 1
    pp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        if self.data_size % self.ep:
            raise ValueError(f"ep {self.ep} does not divide the cp {self.cp} x dp {self.dp} ranks that it shares out")

    @property
    def data_size(self) -> int:
        """Ranks that hold the same dense weights."""
        return self.cp * self.dp

    @property
    def edp(self) -> int:
        """Ranks that hold the same experts."""
        return self.data_size // self.ep

    @property
    def world_size(self) -> int:
        return self.tp * self.data_size * self.pp

    @cached_property
    def _grids(self) -> dict[tuple[str, ...], np.ndarray]:
        """Rank numbers, indexed by the positions on the axes, the last axis first."""
        ranks = np.arange(self.world_size)
        return {axes: ranks.reshape([getattr(self, axis) for axis in reversed(axes)]) for axes in (AXES, EXPERT_AXES)}

    def _view(self, axes: Iterable[str]) -> tuple[np.ndarray, tuple[str, ...]]:
        """The grid that has these axes, and the names of its dims."""
        names = AXES if set(axes) <= set(AXES) else EXPERT_AXES
        return self._grids[names], names[::-1]

    def coordinate(self, rank: int, axis: str) -> int:
        """Position of ``rank`` on ``axis``."""
        grid, names = self._view([axis])
        return int(np.argwhere(grid == rank)[0][names.index(axis)])

    def groups(self, axes: Iterable[str]) -> list[list[int]]:
        """All groups of ranks that differ only in their positions on ``axes``; ranks ascend in each.

        The axes are all of ``AXES`` or all of ``EXPERT_AXES``.
        """
        inner = set(axes)
        grid, names = self._view(inner)
        outer_dims = [i for i, axis in enumerate(names) if axis not in inner]
        inner_dims = [i for i, axis in enumerate(names) if axis in inner]
        size = int(np.prod([grid.shape[i] for i in inner_dims], dtype=int))
        return grid.transpose(outer_dims + inner_dims).reshape(-1, size).tolist()
