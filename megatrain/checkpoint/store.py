"""Writes and reads the arrays of a checkpoint, chunk by chunk; docs/checkpoint.md describes the files.

Knows nothing of processes: who writes which part, and the barriers between the steps of a save, belong to the caller:

    rank 0                       writer.prepare()
    all, after a barrier         writer.write(...) for the parts that are this rank's to write
    rank 0, with all records     writer.commit(records of every rank, state, versions)
    rank 0, if anything failed   writer.discard()
"""

import itertools
import os
import shutil
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt

from megatrain.checkpoint import folder as layout
from megatrain.checkpoint.errors import CheckpointError, explained
from megatrain.checkpoint.manifest import (
    CRC_BYTES,
    DTYPES,
    TENSORS,
    ArraySpec,
    Index,
    Key,
    Manifest,
    StoredArray,
    chunk_file,
    merge_records,
    zarr_array,
    zarr_group,
)

Array = npt.NDArray[Any]
_MAX_MANIFEST_BYTES = 2**28  # some million chunks; a file that claims more isn't read into memory


class CheckpointWriter:
    """One rank's side of one save, in a hidden folder beside the checkpoints that ``commit`` gives its name.

    Args:
        folder: the run's checkpoints; made by ``prepare`` if it isn't there.
        step: number of optimizer steps taken.
        run_id: of the run that saves; stored with every array.
    """

    def __init__(self, folder: Path, step: int, run_id: str):
        self.folder, self.step, self.run_id = folder, step, run_id
        self.partial = layout.partial_path(folder, step)
        self._written: dict[Key, StoredArray] = {}

    def prepare(self) -> list[Path]:
        """Rank 0, first: removes what killed saves left in the folder and makes room for this one.

        Returns the removed stumps, for the log. One save at a time: the stump of another is taken for dead.

        Raises:
            CheckpointError: the folder can't be made or cleaned.
        """
        with explained(f"prepare a checkpoint in {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            removed = layout.clean_stumps(self.folder)
            self.partial.mkdir()
            layout.fsync_folder(self.folder.parent)
        return removed

    def write(
        self,
        kind: str,
        name: str,
        part: Array,
        *,
        offset: Sequence[int],
        full_shape: Sequence[int],
        chunk_shape: Sequence[int] | None = None,
    ) -> None:
        """Writes one chunk and returns when its data is on disk.

        Args:
            kind: ``weight`` (the fp32 master), ``exp_avg``, ``exp_avg_sq``, or another name for a family of arrays.
            name: canonical name of the parameter.
            part: float32 or int64, the region of the full array that begins at ``offset``.
            offset: a multiple of the chunk's shape in every dim.
            full_shape: of the whole, layout-free array.
            chunk_shape: the shape of ``part`` by default. To be given where a part at the upper edge is smaller
                than the others; all parts of an array need the same.

        Raises:
            CheckpointError: another dtype, a part that is not a chunk of the grid, a chunk that this rank wrote
                already, or an error of the file system.
        """
        dtype = part.dtype.name if part.dtype in DTYPES.values() else str(part.dtype)
        chunk_dims = _ints(part.shape if chunk_shape is None else chunk_shape)
        spec = ArraySpec(kind, name, dtype, _ints(full_shape), chunk_dims)
        index = _index_of(spec, part, _ints(offset))
        array = self._written.setdefault(spec.key, StoredArray(spec, {}))
        if array.spec != spec or chunk_file(index) in array.chunks:
            raise CheckpointError(f"{spec.label}: the part at {tuple(offset)} was written already or as {array.spec}")
        path = self.partial / spec.folder / chunk_file(index)
        with explained(f"write {spec.label} to {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            crc = _write_chunk(path, _padded(part, spec))
            if not any(index):  # exactly one rank has the first chunk: it describes the array to other programs
                layout.write_durably(path.with_name("zarr.json"), zarr_array(spec, self.step, self.run_id))
        array.chunks[path.name] = crc

    def records(self) -> list[dict[str, Any]]:
        """What this rank wrote, as JSON; ``commit`` wants those of all ranks."""
        return [array.to_json() for array in self._written.values()]

    def commit(
        self, all_records: Iterable[Mapping[str, Any]], state: Mapping[str, Any], versions: Mapping[str, str]
    ) -> Path:
        """Rank 0, last: makes the checkpoint exist, all at once, and returns its folder.

        An older checkpoint of the same step is replaced, and deleted only when the new one is in place.

        Args:
            all_records: the ``records()`` of every rank, in one list.
            state: all that is not a tensor, as JSON with string keys (tuples come back as lists).
            versions: of the programs that took part, by name.

        Raises:
            CheckpointError: a chunk is missing, was written twice or has another size on disk; ``state`` is not
                JSON; an error of the file system. What was committed before is untouched.
        """
        manifest = Manifest(self.step, self.run_id, dict(versions), dict(state), merge_records(all_records))
        content = manifest.to_bytes()
        _require_files(self.partial, ((array.spec, array.spec.indices()) for array in manifest.arrays.values()))
        with explained(f"commit the checkpoint {self.partial}"):
            groups = {f"{TENSORS}/{kind}" for kind, _ in manifest.arrays} | {TENSORS}
            for group in groups:
                (self.partial / group).mkdir(exist_ok=True)
                layout.write_durably(self.partial / group / "zarr.json", zarr_group())
            for place, _, _ in os.walk(self.partial, topdown=False):
                layout.fsync_folder(Path(place))
            layout.write_durably(self.partial / layout.MANIFEST, content)
            return layout.publish(self.folder, self.step)

    def discard(self) -> None:
        """Rank 0, after a save that failed and when no rank writes any more: gives its disk space back."""
        shutil.rmtree(self.partial, ignore_errors=True)


class CheckpointReader:
    """A committed checkpoint. Every byte that ``read`` returns was checked; safe to use from several threads.

    Args:
        path: the checkpoint's folder, as ``newest_checkpoint`` gives it.

    Raises:
        CheckpointError: no such folder, not committed, or a manifest that is damaged, of a newer version, of another
            step than the folder's name says, or that names places outside the folder.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_dir():
            raise CheckpointError(f"no such checkpoint: {path}")
        if not os.path.lexists(path / layout.MANIFEST):
            raise CheckpointError(f"{path} was never committed: it has no {layout.MANIFEST}")
        try:
            manifest = self._manifest()
        except CheckpointError as error:
            raise CheckpointError(f"{path / layout.MANIFEST}: {error}") from error
        self.step, self.run_id, self.versions = manifest.step, manifest.run_id, manifest.versions
        self.state = manifest.state
        self._arrays = manifest.arrays
        self.arrays = {key: array.spec for key, array in manifest.arrays.items()}

    def require_files(self) -> None:
        """Checks that all chunks are there in their right sizes, without reading them.

        Raises:
            CheckpointError: names all that are missing, of another size or behind a link.
        """
        _require_files(self.path, ((array.spec, array.spec.indices()) for array in self._arrays.values()))

    def read(
        self, kind: str, name: str, offset: Sequence[int] | None = None, shape: Sequence[int] | None = None
    ) -> Array:
        """A region of an array, by default all of it; opens only the chunks that overlap it.

        Args:
            offset: of the region in the full array; by default its start.
            shape: of the region; by default all that is there from ``offset`` on.

        Returns: a new array of ``shape`` and the stored dtype.

        Raises:
            CheckpointError: no such array; a region that leaves it; chunks that are missing, of another size or
                behind a link (all of them named at once, before memory is taken); one that is damaged or not the one
                that was saved.
        """
        if (kind, name) not in self._arrays:
            raise CheckpointError(f"{self.path} holds no {kind} of {name}")
        array = self._arrays[kind, name]
        spec = array.spec
        start = (0,) * len(spec.shape) if offset is None else _ints(offset)
        rest = (dim - begin for dim, begin in zip(spec.shape, start, strict=False))  # _overlapping checks the lengths
        size = tuple(rest) if shape is None else _ints(shape)
        indices = _overlapping(spec, start, size)
        _require_files(self.path, [(spec, indices)])
        region: Array = np.empty(size, DTYPES[spec.dtype])
        for index in indices:
            source, target = _overlap(spec, index, start, size)
            part = region[(*target, ...)]  # the dots keep a view of an array without dims
            whole = part.shape == spec.chunk_shape and part.flags.c_contiguous
            chunk = part if whole else np.empty(spec.chunk_shape, region.dtype)
            self._read_chunk(array, index, chunk)
            if not whole:
                part[...] = chunk[source]
        return region

    def _manifest(self) -> Manifest:
        root = Path(os.path.realpath(self.path))
        with explained("read it"):
            path = _inside(root, layout.MANIFEST)
            if path.stat().st_size > _MAX_MANIFEST_BYTES:
                raise CheckpointError(f"larger than {_MAX_MANIFEST_BYTES} bytes")
            manifest = Manifest.from_bytes(path.read_bytes())
        if layout.step_of(root.name) not in (None, manifest.step):
            raise CheckpointError(f"it belongs to step {manifest.step}, not to this folder")
        return manifest

    def _read_chunk(self, array: StoredArray, index: Index, chunk: Array) -> None:
        path = self.path / array.spec.folder / chunk_file(index)
        with explained(f"read {array.spec.label} from {path}"), open(path, "rb") as file:
            num_bytes = file.readinto(chunk.data)
            trailer = file.read(CRC_BYTES)
        crc = google_crc32c.value(chunk)
        if num_bytes != chunk.nbytes or trailer != crc.to_bytes(CRC_BYTES, "little"):
            raise CheckpointError(f"{array.spec.label}: {path} is damaged: the data does not match its CRC")
        if f"{crc:08x}" != array.chunks[path.name]:
            raise CheckpointError(
                f"{array.spec.label}: {path} is whole but not the chunk that was saved here: "
                "it comes from another place, step or run"
            )


def _index_of(spec: ArraySpec, part: Array, start: tuple[int, ...]) -> Index:
    """Position in the grid of the chunk at ``start``, once it is sure that ``part`` is that chunk."""
    on_grid = len(start) == len(spec.shape) and all(
        0 <= begin < dim and begin % size == 0
        for begin, dim, size in zip(start, spec.shape, spec.chunk_shape, strict=True)
    )
    if on_grid:
        sizes = zip(start, spec.shape, spec.chunk_shape, strict=True)
        on_grid = part.shape == tuple(min(size, dim - begin) for begin, dim, size in sizes)
    if not on_grid:
        raise CheckpointError(
            f"{spec.label}: a part {part.shape} at {start} is not a chunk of the array {spec.shape} "
            f"in chunks of {spec.chunk_shape}"
        )
    return tuple(begin // size for begin, size in zip(start, spec.chunk_shape, strict=True))


def _padded(part: Array, spec: ArraySpec) -> Array:
    """``part`` as it is stored: contiguous and of the chunk's full shape."""
    if part.shape == spec.chunk_shape:
        return np.asarray(part, order="C")
    chunk = np.zeros(spec.chunk_shape, part.dtype)
    chunk[tuple(map(slice, part.shape))] = part
    return chunk


def _write_chunk(path: Path, chunk: Array) -> str:
    """Writes the data and its CRC, waits for the disk, and returns the CRC as 8 hex digits."""
    crc = google_crc32c.value(chunk)
    with open(path, "wb") as file:
        file.write(chunk.data)
        file.write(crc.to_bytes(CRC_BYTES, "little"))
        file.flush()
        os.fsync(file.fileno())
    return f"{crc:08x}"


def _overlapping(spec: ArraySpec, start: tuple[int, ...], size: tuple[int, ...]) -> list[Index]:
    """The chunks that share elements with the region."""
    if not len(start) == len(size) == len(spec.shape) or not all(
        begin >= 0 and 1 <= length <= dim - begin for begin, length, dim in zip(start, size, spec.shape, strict=True)
    ):
        raise CheckpointError(f"{spec.label}: a region {size} at {start} is not inside the array {spec.shape}")
    regions = zip(start, size, spec.chunk_shape, strict=True)
    return list(
        itertools.product(*(range(begin // part, (begin + length - 1) // part + 1) for begin, length, part in regions))
    )


def _overlap(
    spec: ArraySpec, index: Index, start: tuple[int, ...], size: tuple[int, ...]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What a chunk and a region share, as slices of the chunk and as slices of the region."""
    source, target = [], []
    for position, part, begin, length in zip(index, spec.chunk_shape, start, size, strict=True):
        first, last = max(begin, position * part), min(begin + length, (position + 1) * part)
        source.append(slice(first - position * part, last - position * part))
        target.append(slice(first - begin, last - begin))
    return tuple(source), tuple(target)


def _require_files(folder: Path, chunks: Iterable[tuple[ArraySpec, Iterable[Index]]]) -> None:
    """Checks that the chunks' files are there, inside the checkpoint and of the right size; names all that aren't."""
    root, problems = Path(os.path.realpath(folder)), []
    for spec, indices in chunks:
        for index in indices:
            relative = f"{spec.folder}/{chunk_file(index)}"
            try:
                num_bytes = _inside(root, relative).stat().st_size
                if num_bytes != spec.file_bytes:
                    problems.append(f"{spec.label}: {relative} has {num_bytes} bytes instead of {spec.file_bytes}")
            except FileNotFoundError:
                problems.append(f"{spec.label}: {relative} is missing")
            except (CheckpointError, OSError) as error:
                problems.append(f"{spec.label}: {relative}: {error}")
    if problems:
        raise CheckpointError(f"{folder} is damaged: " + "; ".join(problems))


def _inside(root: Path, relative: str) -> Path:
    """A regular file of the checkpoint ``root`` (a path without links); refuses links, which could lead anywhere."""
    path = root / relative
    if os.path.realpath(path) != str(path):
        raise CheckpointError("a link leads elsewhere: refused")
    if path.exists() and not stat.S_ISREG(path.lstat().st_mode):
        raise CheckpointError("not a regular file: refused")
    return path


def _ints(values: Sequence[int]) -> tuple[int, ...]:
    """Plain ints, which JSON knows, of a shape that may hold NumPy's."""
    return tuple(map(int, values))
