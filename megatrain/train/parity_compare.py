"""Compares the captured steps of two layouts, tensor by tensor, in the order in which a step computes them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatrain.engine.kinds import WEIGHT
from megatrain.train.parity import ACTIVATION, GRADIENT, RankCapture

Key = tuple[str, str]


@dataclass(frozen=True)
class Bands:
    """Largest error that rounding explains, relative to the largest value of a tensor (or to the number itself)."""

    activation: float
    loss: float
    gradient: float
    norm: float
    weight: float


# FP32: sums over ranks, micro-batches and split dims in another order; eps is 1.2e-7 and sums have up to 10^4 terms.
# BF16 rounds every activation by 2^-9 and FP16 by 2^-12, and a tensor split rounds partial sums that a whole matrix
# does not have; a gradient has seen twice the depth. Losses average over many tokens. Weights are FP32 in all of them.
BANDS = {
    "fp32": Bands(activation=2e-5, loss=1e-5, gradient=2e-4, norm=2e-5, weight=2e-6),
    "bf16": Bands(activation=4e-2, loss=2e-3, gradient=1e-1, norm=3e-2, weight=2e-6),
    "fp16": Bands(activation=1e-2, loss=5e-4, gradient=3e-2, norm=1e-2, weight=2e-6),
}


@dataclass(frozen=True)
class Divergence:
    """A tensor or number of ``rank`` that is further from the reference than ``band``."""

    what: str
    rank: int
    error: float
    band: float

    def __str__(self) -> str:
        return f"{self.what} on rank {self.rank}: relative error {self.error:.2e}, band {self.band:.0e}"


def compare(ranks: list[RankCapture], reference: list[RankCapture], bands: Bands, lr: float) -> list[Divergence]:
    """All that diverges, first what a step computes first. ``lr``: learning rate of the step."""
    whole = {key: _assemble(reference, key) for key in {key for rank in reference for key in rank.parts}}
    keys = sorted(whole, key=_order)

    def tensors(kind: str) -> Iterator[Divergence]:
        return (found for key in keys if key[0] == kind for found in _tensor(key, ranks, whole, bands, lr))

    return [
        *_scalar("skipped", ranks, reference, 0.0),
        *tensors(ACTIVATION),
        *_scalar("loss", ranks, reference, bands.loss),
        *tensors(GRADIENT),
        *_scalar("gradient norm", ranks, reference, bands.norm),
        *tensors(WEIGHT),
    ]


def _scalar(name: str, ranks: list[RankCapture], reference: list[RankCapture], band: float) -> Iterator[Divergence]:
    wanted = reference[0].scalars[name]
    for captured in ranks:
        value = captured.scalars[name]
        error = abs(value - wanted) / max(abs(wanted), 1e-30)
        if value != wanted and not error <= band:
            yield Divergence(name, captured.rank, error, band)


def _tensor(
    key: Key, ranks: list[RankCapture], whole: dict[Key, np.ndarray], bands: Bands, lr: float
) -> Iterator[Divergence]:
    kind, name = key
    holders = [captured for captured in ranks if key in captured.parts]
    if not holders:
        yield Divergence(f"{kind} of {name} (nobody has it)", ranks[0].rank, np.inf, 0.0)
    for captured in holders:
        part = captured.parts[key]
        wanted = whole[key][np.ix_(*part.index)]
        scale = max(float(np.abs(whole[key]).max()), 1e-30)
        error = np.abs(part.values - wanted)
        allowed = getattr(bands, kind) * scale * np.ones_like(error)
        if kind == WEIGHT:
            gradient = whole.get((GRADIENT, name))
            own = None if gradient is None else gradient[np.ix_(*part.index)]
            allowed += lr * _update_error(own, bands.gradient)
        if not (error <= allowed).all():
            yield Divergence(f"{kind} of {name}", captured.rank, float(error.max()) / scale, getattr(bands, kind))


def _update_error(gradient: np.ndarray | None, band: float) -> np.ndarray | float:
    """How far an update may be off, in learning rates: a first step goes by about one learning rate in the direction
    of the gradient, and where the gradient is rounding, so is its direction. An optimizer that keeps no gradient
    (Adafactor) divides by means of rows and columns, which are not small."""
    if gradient is None:
        return 20 * band
    small = np.abs(gradient) <= 2 * band * np.abs(gradient).max()
    return np.where(small, 2.1, 20 * band)


def _assemble(ranks: list[RankCapture], key: Key) -> np.ndarray:
    parts = [captured.parts[key] for captured in ranks if key in captured.parts]
    shape = [1 + max(int(part.index[dim].max()) for part in parts) for dim in range(parts[0].values.ndim)]
    whole = np.zeros(shape, dtype=np.float32)
    for part in reversed(parts):  # of replicas the first counts
        whole[np.ix_(*part.index)] = part.values
    return whole


def _order(key: Key) -> tuple[int, tuple[int, int], str]:
    """Activations from the embedding on, gradients from the head back, weights as activations."""
    kind, name = key
    block = re.match(r"layers\.(\d+)", name)
    depth = (1, int(block.group(1))) if block else (0, 0) if name.startswith("embedding") else (2, 0)
    if kind == GRADIENT:
        depth = (-depth[0], -depth[1])
    return [ACTIVATION, GRADIENT, WEIGHT].index(kind), depth, name
