"""Compares the captured steps of two layouts, tensor by tensor, in the order in which a step computes them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatrain.parity.bands import Bands, Measures, assemble, measure
from megatrain.parity.capture import ACTIVATION, BIAS, CONTRIBUTION, GRADIENT, UPDATE, Key, RankCapture
from megatrain.parity.exact import gradients_are_sums, norm_is_of_gradients
from megatrain.spec.kinds import FACTORS, MOMENTS, WEIGHT


@dataclass(frozen=True)
class Divergence:
    """A tensor or number of ``rank`` that is further from the reference than ``band``, relative to its size."""

    what: str
    step: int
    rank: int
    error: float
    band: float
    measure: str = "error"

    def __str__(self) -> str:
        where = f"{self.what} in step {self.step} on rank {self.rank}"
        return f"{where}: relative {self.measure} {self.error:.2e}, band {self.band:.1e}"


def compare(ranks: list[RankCapture], bands: Bands) -> list[Divergence]:
    """All that diverges, first what the steps compute first."""
    found: list[Divergence] = []
    keys = sorted((key for key in bands.whole if key[1] != CONTRIBUTION), key=_order)
    whole = assemble(ranks)

    def tensors(step: int, *kinds: str) -> Iterator[Divergence]:
        return (d for key in keys if key[0] == step and key[1] in kinds for d in _tensor(key, ranks, bands))

    found += tensors(0, WEIGHT)
    for step in sorted({step for step, _ in ranks[0].scalars}):
        found += _scalar(step, "skipped", ranks, bands, 0.0)
        found += _scalar(step, "loss scale", ranks, bands, 0.0)
        found += tensors(step, ACTIVATION)
        found += _scalar(step, "loss", ranks, bands, bands.scalar(step, "loss"))
        if step == 1:
            found += tensors(step, GRADIENT)
            found += _exact(ranks, whole)
        found += _scalar(step, "gradient norm", ranks, bands, bands.scalar(step, "gradient norm"))
        found += tensors(step, UPDATE, *MOMENTS, *FACTORS, BIAS)
    return found


def _exact(ranks: list[RankCapture], whole: dict[Key, np.ndarray]) -> Iterator[Divergence]:
    for name, error, band in gradients_are_sums(whole, ranks[0].sum_eps):
        yield Divergence(f"sum over backward passes of {name}", 1, ranks[0].rank, error, band)
    for captured in ranks:
        error, band = norm_is_of_gradients(whole, captured.scalars[1, "gradient norm"])
        if not error <= band:
            yield Divergence("gradient norm against the gradients", 1, captured.rank, error, band)


def _scalar(step: int, name: str, ranks: list[RankCapture], bands: Bands, band: float) -> Iterator[Divergence]:
    wanted = bands.wanted(step, name)
    for captured in ranks:
        value = captured.scalars[step, name]
        error = abs(value - wanted) / max(abs(wanted), 1e-30)
        if value != wanted and not error <= band:
            yield Divergence(name, step, captured.rank, error, band)


def _tensor(key: Key, ranks: list[RankCapture], bands: Bands) -> Iterator[Divergence]:
    step, kind, name = key
    holders = [captured for captured in ranks if key in captured.parts]
    if not holders:
        yield Divergence(f"{kind} of {name} (nobody has it)", step, ranks[0].rank, np.inf, 0.0)
    allowed: dict[str, Measures] = {}
    for captured in holders:
        part = captured.parts[key]
        place = np.ix_(*part.index)
        band = allowed.setdefault(str(part.index), {}) or bands.allowed(key, place)
        allowed[str(part.index)] = band  # of copies made once
        wanted = bands.whole[key][place]
        found = measure(kind, part.values - wanted, wanted, bands.weight_before(key, place))
        over = {name: value / max(band[name], 1e-300) for name, value in found.items() if not value <= band[name]}
        if over:
            worst = max(over, key=lambda name: over[name])
            scale = 1.0 if kind == BIAS else max(float(np.sqrt(np.mean(np.square(wanted)))), 1e-30)
            yield Divergence(f"{kind} of {name}", step, captured.rank, found[worst] / scale, band[worst] / scale, worst)


def _order(key: Key) -> tuple[int, int, tuple[int, int], str]:
    """Activations from the embedding on, gradients from the head back, what follows as activations."""
    step, kind, name = key
    block = re.match(r"layers\.(\d+)", name)
    depth = (1, int(block.group(1))) if block else (0, 0) if name.startswith("embedding") else (2, 0)
    if kind == GRADIENT:
        depth = (-depth[0], -depth[1])
    return step, [WEIGHT, ACTIVATION, GRADIENT, *MOMENTS, *FACTORS, UPDATE, BIAS].index(kind), depth, name
