"""Looks at checkpoints: what is there, whether it is whole, how two differ. Reads at most a few chunks at a time."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np

from megatrain.checkpoint.store.arrays import CheckpointReader
from megatrain.checkpoint.store.errors import CheckpointError
from megatrain.checkpoint.store.grid import region_of
from megatrain.checkpoint.store.manifest import DTYPES, ArraySpec, Index, Key
from megatrain.checkpoint.store.tokenizer_file import tokenizer_of

Progress = Callable[[int], object]  # told the bytes that were read


@dataclass(frozen=True)
class Difference:
    """How one array differs between two checkpoints.

    ``relative``: the largest difference over the largest value of the first.
    """

    key: Key
    equal: bool
    largest: float
    relative: float
    note: str = ""


def data_bytes(spec: ArraySpec) -> int:
    """Bytes of all elements of an array."""
    return int(np.prod(spec.shape, dtype=object)) * DTYPES[spec.dtype].itemsize


def total_bytes(reader: CheckpointReader) -> int:
    """Bytes of all arrays of a checkpoint."""
    return sum(data_bytes(spec) for spec in reader.arrays.values())


def verify(reader: CheckpointReader, threads: int, progress: Progress = lambda num_bytes: None) -> list[str]:
    """Reads every chunk; returns everything that is wrong."""
    try:
        reader.require_files()
    except CheckpointError as error:
        return [str(error)]

    def problem(chunk: tuple[Key, Index]) -> str | None:
        key, index = chunk
        try:
            progress(reader.check(*key, index))
        except CheckpointError as error:
            return str(error)
        return None

    chunks = ((key, index) for key, spec in reader.arrays.items() for index in spec.indices())
    with ThreadPoolExecutor(threads, "verify") as pool:
        found: list[str | None] = []
        while batch := list(islice(chunks, 64 * threads)):  # not a future for each of a million chunks
            found += pool.map(problem, batch)
        try:
            tokenizer_of(reader)
        except CheckpointError as error:
            found.append(str(error))
    return [text for text in found if text]


def differences(
    first: CheckpointReader, second: CheckpointReader, progress: Progress = lambda num_bytes: None
) -> Iterator[Difference]:
    """Compares array by array, chunk by chunk of the first; the grids may differ."""
    for key in sorted(first.arrays.keys() | second.arrays.keys()):
        one, two = first.arrays.get(key), second.arrays.get(key)
        if one is None or two is None:
            yield Difference(
                key, False, float("inf"), float("inf"), f"only in the {'second' if one is None else 'first'}"
            )
        elif (one.shape, one.dtype) != (two.shape, two.dtype):
            told = f"{one.dtype} {list(one.shape)} and {two.dtype} {list(two.shape)}"
            yield Difference(key, False, float("inf"), float("inf"), told)
        else:
            yield _difference(first, second, one, progress)


def _difference(first: CheckpointReader, second: CheckpointReader, spec: ArraySpec, progress: Progress) -> Difference:
    equal, largest, scale = True, 0.0, 0.0
    for index in spec.indices():
        offset, shape = region_of(spec, index)
        one, two = first.read(*spec.key, offset, shape), second.read(*spec.key, offset, shape)
        scale = np.fmax(scale, np.abs(one).max().astype(float))
        if one.tobytes() != two.tobytes():
            equal = False
            gap = np.abs(one.astype(np.float64) - two).max()
            largest = float(gap if np.isnan(gap) else np.maximum(largest, gap))
        progress(one.nbytes)
    relative = 0.0 if largest == 0.0 else largest / scale if scale else float("inf")
    return Difference(spec.key, equal, largest, float(relative))


def tree(reader: CheckpointReader) -> Iterator[tuple[int, str, str, int]]:
    """(depth, label, shape and types, bytes) of every group of names and every tensor, in order."""
    nodes: dict[str, int] = {}
    tensors: dict[str, list[ArraySpec]] = {}
    for (_, name), spec in reader.arrays.items():
        tensors.setdefault(name, []).append(spec)
        parts = name.split(".")
        for depth in range(len(parts)):
            prefix = ".".join(parts[: depth + 1])
            nodes[prefix] = nodes.get(prefix, 0) + data_bytes(spec)
    for prefix in sorted(nodes, key=_natural):
        specs = tensors.get(prefix, [])
        told = ""
        if specs:
            shape = " x ".join(map(str, specs[0].shape)) or "scalar"
            told = f"{shape}  " + ", ".join(f"{spec.kind} {spec.dtype}" for spec in specs)
        yield prefix.count("."), prefix.rsplit(".", 1)[-1], told, nodes[prefix]


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Layer 10 comes after layer 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]
