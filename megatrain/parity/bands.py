"""How far rounding alone takes each tensor: measured on disturbed runs of the reference, not set by hand."""

from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from megatrain.parity.capture import BIAS, CONTRIBUTION, GRADIENT, UPDATE, Key, RankCapture, TensorPart
from megatrain.spec.kinds import MOMENTS, WEIGHT

Measures = dict[str, float]
RMS, HALF, ALONG, LARGEST = "error", "median error", "error along itself", "largest error"
ROWS, DECAY, NUMBER = "error of rows", "error along the weight", "number of experts"
_BY_ROWS = (GRADIENT, *MOMENTS)
FACTOR = 4.0
"""Band over the largest spread that the draws had."""
FLOOR = 2.0**-21
"""Of the largest number that was stored: four roundings of the FP32 in which states are kept."""
TIPPED = 4
"""Elements of an update that may go the other way altogether, however few or small the draws' were."""


def assemble(ranks: list[RankCapture]) -> dict[Key, np.ndarray]:
    """Whole tensors: of copies the first counts; the contributions of ranks are added up."""
    holders: defaultdict[Key, list[TensorPart]] = defaultdict(list)
    for captured in ranks:
        for key, part in captured.parts.items():
            holders[key].append(part)
    whole = {}
    for key, parts in holders.items():
        shape = [1 + max(int(part.index[dim].max()) for part in parts) for dim in range(parts[0].values.ndim)]
        whole[key] = np.zeros(shape)
        for part in reversed(parts):
            place = np.ix_(*part.index)
            whole[key][place] = part.values + (whole[key][place] if key[1] == CONTRIBUTION else 0)
    return whole


def measure(kind: str, error: np.ndarray, wanted: np.ndarray, weight: np.ndarray | None) -> Measures:
    """The size of an error in ways of which each sees what the others don't.

    The root of the mean square; the median, which the few elements that tip over (AdamW's first step goes by a whole
    learning rate in the direction of a gradient that is rounding) do not move; the part along the tensor itself, a
    wrong factor; the largest or, of an update, the part along the weight, a wrong decay; of a gradient or moment the
    mean square over rows, each relative to its own size: queries' and keys' are small beside the values'.
    """
    if kind == BIAS:
        return {NUMBER: float((error != 0).sum())}
    size, half = np.sqrt(error.size), float(np.median(np.abs(error)))
    found = {RMS: _norm(error) / size, HALF: half}
    if kind in _BY_ROWS and error.ndim > 1:
        found[ROWS] = _norm(wanted) / size * _of_rows(error, wanted)
    if kind != UPDATE:
        return found | {ALONG: _along(error, wanted) / size, LARGEST: float(np.abs(error).max())}
    bounded = np.clip(error, -4 * half, 4 * half)  # a regression that does not follow what tips over
    found[ALONG] = _along(bounded, wanted) / size
    return found if weight is None else found | {DECAY: _along(bounded, weight) / size}


def _of_rows(error: np.ndarray, wanted: np.ndarray) -> float:
    """Rows without a gradient, of tokens that were not read, are left out."""
    error_R, wanted_R = (np.sqrt(np.square(x).mean(-1)).ravel() for x in (error, wanted))
    own = wanted_R > 0
    return float(np.sqrt(np.mean(np.square(error_R[own] / wanted_R[own])))) if own.any() else 0.0


def _along(error: np.ndarray, direction: np.ndarray) -> float:
    return abs(float((error * direction).sum())) / max(_norm(direction), 1e-300)


def _norm(x: np.ndarray) -> float:
    return float(np.sqrt(np.square(x).sum()))


class Bands:
    """``reference``: captures of all ranks, first undisturbed, then disturbed ones."""

    def __init__(self, reference: list[list[RankCapture]]):
        self.whole, *self._draws = [assemble(ranks) for ranks in reference]
        self._scalars = [ranks[0].scalars for ranks in reference]
        self._pooled = self._usual_spread()

    @property
    def num_tensors(self) -> int:
        """Whole tensors that are compared, each in each step."""
        return sum(key[1] != CONTRIBUTION for key in self.whole)

    def weight_before(self, key: Key, place: tuple[np.ndarray, ...]) -> np.ndarray | None:
        """The initial weight of an update's tensor."""
        weight = self.whole.get((0, WEIGHT, key[2]))
        return None if key[1] != UPDATE or weight is None else weight[place]

    def allowed(self, key: Key, place: tuple[np.ndarray, ...]) -> Measures:
        """What rounding may make of each measure of a part of a tensor."""
        if key[1] == WEIGHT:  # before the first step
            return dict.fromkeys((RMS, HALF, ALONG, LARGEST), 0.0)
        own = list(self._spread(key, place))
        if key[1] == BIAS:  # a token near a tie moves one expert up and another down
            return {NUMBER: 2 + 2 * max(m[NUMBER] for m in own)}
        wanted, weight = self.whole[key][place], self.weight_before(key, place)
        scale = _norm(wanted) / np.sqrt(wanted.size)
        stored = max(np.abs(x).max() for x in (wanted, weight) if x is not None)
        bands = {
            name: FACTOR * max(max(m[name] for m in own), scale * self._pooled[key[:2]][name]) + FLOOR * float(stored)
            for name in own[0]
        }
        if key[1] == UPDATE:
            bands[RMS] = float(np.hypot(bands[RMS], 2 * scale * np.sqrt(TIPPED / wanted.size)))
        return bands

    def wanted(self, step: int, name: str) -> float:
        """A number of the undisturbed reference."""
        return self._scalars[0][step, name]

    def scalar(self, step: int, name: str) -> float:
        """Band of a number, relative to it: over several steps, as few draws may all lie near by chance."""
        plain, *draws = self._scalars
        near = {key: value for key, value in plain.items() if key[1] == name and key[0] <= max(step, 2) and value}
        off = [abs(draw[key] / value - 1) for key, value in near.items() for draw in draws]
        return FACTOR * max(off, default=0.0) + FLOOR

    def _spread(self, key: Key, place: tuple[np.ndarray, ...]) -> Iterator[Measures]:
        wanted, weight = self.whole[key][place], self.weight_before(key, place)
        for draw in self._draws:
            yield measure(key[1], draw[key][place] - wanted, wanted, weight)

    def _usual_spread(self) -> dict[tuple[int, str], Measures]:
        """The usual spread of a tensor by step and kind, relative to its size: a small tensor may have had luck."""
        found: defaultdict[tuple[int, str], defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for key, wanted in self.whole.items():
            scale = _norm(wanted) / np.sqrt(wanted.size)
            if key[1] in (WEIGHT, BIAS, CONTRIBUTION) or scale == 0:
                continue
            for measures in self._spread(key, (...,)):  # type: ignore[arg-type]
                for name, value in measures.items():
                    found[key[:2]][name].append(value / scale)
        return {
            kind: {name: _usual(name, np.array(values)) for name, values in by_name.items()}
            for kind, by_name in found.items()
        }


def _usual(name: str, spreads: np.ndarray) -> float:
    """What is usual among the tensors' spreads: for median errors their median, as that measure follows no outlier,
    else the mean square."""
    return float(np.median(spreads) if name == HALF else np.sqrt(np.mean(spreads**2)))
