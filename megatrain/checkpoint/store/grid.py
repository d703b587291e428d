"""Arithmetic of an array's grid of chunks: which chunk a part is, which chunks a region needs."""

import itertools
from collections.abc import Sequence
from typing import Any

from megatrain.checkpoint.store.errors import CheckpointError
from megatrain.checkpoint.store.manifest import ArraySpec, Index


def index_of(spec: ArraySpec, shape: tuple[int, ...], start: tuple[int, ...]) -> Index:
    """Position in the grid of the chunk at ``start``, once it is sure that a part of ``shape`` is that chunk."""
    on_grid = len(start) == len(spec.shape) and all(
        0 <= begin < dim and begin % size == 0
        for begin, dim, size in zip(start, spec.shape, spec.chunk_shape, strict=True)
    )
    if on_grid:
        sizes = zip(start, spec.shape, spec.chunk_shape, strict=True)
        on_grid = shape == tuple(min(size, dim - begin) for begin, dim, size in sizes)
    if not on_grid:
        raise CheckpointError(
            f"{spec.label}: a part {shape} at {start} is not a chunk of the array {spec.shape} "
            f"in chunks of {spec.chunk_shape}"
        )
    return tuple(begin // size for begin, size in zip(start, spec.chunk_shape, strict=True))


def region_of(spec: ArraySpec, index: Index) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offset and shape of a chunk's elements in the array."""
    offset = tuple(position * part for position, part in zip(index, spec.chunk_shape, strict=True))
    sizes = zip(offset, spec.chunk_shape, spec.shape, strict=True)
    return offset, tuple(min(part, dim - begin) for begin, part, dim in sizes)


def overlapping(spec: ArraySpec, start: tuple[int, ...], size: tuple[int, ...]) -> list[Index]:
    """The chunks that share elements with the region."""
    if not len(start) == len(size) == len(spec.shape) or not all(
        begin >= 0 and 1 <= length <= dim - begin for begin, length, dim in zip(start, size, spec.shape, strict=True)
    ):
        raise CheckpointError(f"{spec.label}: a region {size} at {start} is not inside the array {spec.shape}")
    regions = zip(start, size, spec.chunk_shape, strict=True)
    return list(
        itertools.product(*(range(begin // part, (begin + length - 1) // part + 1) for begin, length, part in regions))
    )


def overlap(
    spec: ArraySpec, index: Index, start: tuple[int, ...], size: tuple[int, ...]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What a chunk and a region share, as slices of the chunk and as slices of the region."""
    source, target = [], []
    for position, part, begin, length in zip(index, spec.chunk_shape, start, size, strict=True):
        first, last = max(begin, position * part), min(begin + length, (position + 1) * part)
        source.append(slice(first - position * part, last - position * part))
        target.append(slice(first - begin, last - begin))
    return tuple(source), tuple(target)


def ints(values: Sequence[int]) -> tuple[int, ...]:
    """Plain ints, which JSON knows, of a shape that may hold NumPy's."""
    return tuple(map(int, values))
