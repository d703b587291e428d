"""What is said of a parameter once, for all who ask: initial weights, optimizers, layouts, counts, converters."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from fractions import Fraction
from typing import Literal

Initial = Literal["normal", "residual", "ones", "zeros"]
"""normal: of ``model.init_std``. residual: the same divided by sqrt(2 num_layers), for what a sublayer adds to the
stream (Radford et al. 2019)."""


@dataclass(frozen=True)
class Treatment:
    """How a role is treated.

    decays: weight decay takes from it. orthogonal: Muon orthogonalises it. multiplied: a token's activations are
    multiplied by it; the others are looked up, added or scale.
    """

    decays: bool
    orthogonal: bool
    multiplied: bool


class Role(Enum):
    """What a parameter is there for."""

    TABLE = "rows that are looked up"
    HEAD = "rows that a token is scored by"
    MATRIX = "a matrix, or several with their rows one after the other"
    EXPERTS = "a matrix of each expert, one after the other"
    NORM = "scale of a norm"
    BIAS = "what is added"

    @property
    def treatment(self) -> Treatment:
        return _TREATMENTS[self]


_TREATMENTS = {
    Role.TABLE: Treatment(decays=True, orthogonal=False, multiplied=False),
    Role.HEAD: Treatment(decays=True, orthogonal=False, multiplied=True),
    Role.MATRIX: Treatment(decays=True, orthogonal=True, multiplied=True),
    Role.EXPERTS: Treatment(decays=True, orthogonal=False, multiplied=True),
    Role.NORM: Treatment(decays=False, orthogonal=False, multiplied=False),
    Role.BIAS: Treatment(decays=False, orthogonal=False, multiplied=False),
}


@dataclass(frozen=True)
class Parameter:
    """A parameter of the whole model, as no layout changes it.

    name: canonical. shape: of the whole tensor. split: the dim that an axis splits, by axis; none of an axis: every
    rank of it holds all. stacked_rows: where it is several matrices, how many rows of each stand one after the other,
    again and again. used: the share of its elements that works on a token.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    initial: Initial
    split: Mapping[str, int] = field(default_factory=dict)
    stacked_rows: tuple[int, ...] = ()
    used: Fraction = Fraction(1)

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)
