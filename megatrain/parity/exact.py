"""What must hold inside one layout, whatever its 16 bits did: sums and norms are made in FP32.

These two need no reference, so their bands are those of FP32 in every type: rounding in the passes hides what is wrong
after them, as a sum of gradients over replicas in 16 bits, or a norm that counts copies.
"""

from collections.abc import Iterator

import numpy as np

from megatrain.parity.capture import CONTRIBUTION, GRADIENT, Key
from megatrain.spec.kinds import FACTORS

ROUNDINGS = 32
"""Roundings of a sum over micro-batches and ranks, and of the moment that the gradient is read off."""
_EPS = 2.0**-24


def gradients_are_sums(whole: dict[Key, np.ndarray], sum_eps: float) -> Iterator[tuple[str, float, float]]:
    """(name, relative error, band) of each gradient that is not the sum of what the backward passes gave.

    Up to one factor: of the loss scale, or of an average that the loss makes up for. The comparison with the reference
    sees a wrong one. Adafactor keeps squares; of matrices their means over rows and columns.
    """
    band = ROUNDINGS * sum_eps
    for (step, kind, name), total in whole.items():
        if step != 1 or kind != CONTRIBUTION:
            continue
        for made, found in _pairs(whole, name, total):
            size = float(np.sqrt(np.square(found).sum()))
            if size == 0 and not made.any():
                continue
            factor = float((made * found).sum()) / max(float(np.square(made).sum()), 1e-300)
            error = float(np.sqrt(np.square(found - factor * made).sum())) / max(size, 1e-300)
            if not error <= band:
                yield name, error, band


def _pairs(whole: dict[Key, np.ndarray], name: str, total: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    if (1, GRADIENT, name) in whole:
        yield total, whole[1, GRADIENT, name]
        return
    if (1, "exp_avg_sq", name) in whole:
        yield total**2, whole[1, "exp_avg_sq", name]
    for axis, kind in zip((1, 0), FACTORS, strict=True):
        if (1, kind, name) in whole:
            yield np.mean(total**2, axis), whole[1, kind, name]


def norm_is_of_gradients(whole: dict[Key, np.ndarray], norm: float) -> tuple[float, float]:
    """Relative error of the norm that a rank knows against that of all gradients, each counted once; and its band.

    FP32 norms add squares one by one (torch on CPUs, in a few lanes), each sum rounded up or down.
    """
    squares, size = 0.0, 0
    for name in {name for step, kind, name in whole if (step, kind) == (1, CONTRIBUTION)}:
        size += whole[1, CONTRIBUTION, name].size
        if (1, GRADIENT, name) in whole:
            squares += float(np.square(whole[1, GRADIENT, name]).sum())
        elif (1, "exp_avg_sq", name) in whole:
            squares += float(whole[1, "exp_avg_sq", name].sum())
        else:
            rows, columns = (whole[1, kind, name] for kind in FACTORS)
            squares += float(rows.sum()) * len(columns)
    return abs(norm / max(np.sqrt(squares), 1e-300) - 1), _EPS * (16 + size**0.5)
