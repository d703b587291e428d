"""One checkpoint out of several: the average of their weights and moments, or a moving one."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatrain.checkpoint.store.arrays import CheckpointReader, CheckpointWriter
from megatrain.checkpoint.store.errors import CheckpointError, UnfitError
from megatrain.checkpoint.store.folder import checkpoint_name
from megatrain.checkpoint.store.grid import region_of
from megatrain.checkpoint.store.manifest import ArraySpec, Index
from megatrain.checkpoint.store.tokenizer_file import tokenizer_of
from megatrain.disk.target import require_free


def decay_of(text: str) -> float:
    """A decay of a moving average, from 0 to below 1.

    Raises:
        ValueError: another number, or none.
    """
    value = float(text)
    if not 0.0 <= value < 1.0:
        raise ValueError(text)
    return value


def average_factors(count: int) -> list[float]:
    """The plain mean."""
    return [1.0 / count] * count


def ema_factors(count: int, decay: float) -> list[float]:
    """Exponential moving average from the first on: ``x = decay * x + (1 - decay) * next``."""
    factors = [(1.0 - decay) * decay ** (count - 1 - i) for i in range(count)]
    factors[0] = decay ** (count - 1)
    return factors


def merge(
    sources: Sequence[CheckpointReader],
    factors: Sequence[float],
    folder: Path,
    progress: Callable[[int], object] = lambda num_bytes: None,
) -> Path:
    """Writes ``folder/step-…``, the sum of ``factor * source`` in double precision; all else is the last source's.

    Needs memory for one chunk of each source.

    Raises:
        UnfitError: the sources are of different models.
        CheckpointError: one is damaged, an integer array differs, ``folder`` can't be written or has such a step.
    """
    last = sources[-1]
    try:
        require_free(folder / checkpoint_name(last.step), "choose another --output, where no step is replaced")
    except FileExistsError as error:
        raise CheckpointError(str(error)) from error
    for source in sources:
        if source.arrays.keys() != last.arrays.keys() or source.state.get("model") != last.state.get("model"):
            raise UnfitError(f"{source.path} and {last.path} are of different models")
    writer = CheckpointWriter(folder, last.step, last.run_id)
    writer.prepare()
    try:
        for spec in last.arrays.values():
            for index in spec.indices():
                part = _merged(sources, factors, spec, index)
                offset, _ = region_of(spec, index)
                writer.write(
                    spec.kind, spec.name, part, offset=offset, full_shape=spec.shape, chunk_shape=spec.chunk_shape
                )
                progress(part.nbytes * len(sources))
        merged_from: list[dict[str, Any]] = [
            {"step": source.step, "run_id": source.run_id, "factor": factor}
            for source, factor in zip(sources, factors, strict=True)
        ]
        state = {**last.state, "merged_from": merged_from}
        if (tokenizer := tokenizer_of(last)) is not None:
            tokenizer.write(writer.partial)
        return writer.commit(writer.records(), state, last.versions)
    except CheckpointError:
        writer.close()
        writer.discard()
        raise
    finally:
        writer.close()


def _merged(sources: Sequence[CheckpointReader], factors: Sequence[float], spec: ArraySpec, index: Index) -> np.ndarray:
    offset, shape = region_of(spec, index)
    parts = [source.read(*spec.key, offset, shape) for source in sources]
    if not np.issubdtype(parts[-1].dtype, np.floating):
        if any(not np.array_equal(part, parts[-1]) for part in parts):
            raise CheckpointError(f"{spec.label} holds integers that differ: they have no average")
        return parts[-1]
    total = sum(factor * part.astype(np.float64) for factor, part in zip(factors, parts, strict=True))
    return np.asarray(total).astype(parts[-1].dtype)
