"""Where a rank is: pure arithmetic over the mesh, without processes.

Ranks are numbered with the tensor axis fastest and the pipeline axis slowest, the order of
megatron-core (``tp-cp-ep-dp-pp``).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

AXES = ("tp", "dp", "pp")  # fastest first


@dataclass(frozen=True)
class Topology:
    """Sizes of the axes. ``world_size`` ranks stand at the points of a dp x tp x pp grid."""

    tp: int = 1
    dp: int = 1
    pp: int = 1

    @property
    def world_size(self) -> int:
        return self.tp * self.dp * self.pp

    @cached_property
    def _grid(self) -> np.ndarray:
        """Rank numbers, indexed [pp, dp, tp]."""
        return np.arange(self.world_size).reshape([getattr(self, axis) for axis in reversed(AXES)])

    def coordinate(self, rank: int, axis: str) -> int:
        """Position of ``rank`` on ``axis``."""
        return int(np.argwhere(self._grid == rank)[0][AXES[::-1].index(axis)])

    def groups(self, axes: Iterable[str]) -> list[list[int]]:
        """All groups of ranks that differ only in their positions on ``axes``; ranks ascend in each."""
        inner = set(axes)
        outer_dims = [i for i, axis in enumerate(AXES[::-1]) if axis not in inner]
        inner_dims = [i for i, axis in enumerate(AXES[::-1]) if axis in inner]
        size = int(np.prod([self._grid.shape[i] for i in inner_dims], dtype=int))
        return self._grid.transpose(outer_dims + inner_dims).reshape(-1, size).tolist()
