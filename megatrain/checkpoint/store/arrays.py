"""Writes and reads the arrays of a checkpoint, chunk by chunk; docs/checkpoint.md describes the files.

Knows nothing of processes: who writes which part, and the barriers between the steps of a save, belong to the caller:

    rank 0                       writer.prepare()
    all, after a barrier         writer.write(...) for the parts that are this rank's to write
    rank 0, with all records     writer.commit(records of every rank, state, versions)
    rank 0, if anything failed   writer.discard()
"""

import os
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from megatrain.checkpoint.store import folder as layout
from megatrain.checkpoint.store.errors import CheckpointError, explained, persistently
from megatrain.checkpoint.store.files import Array, Files, new_array, padded
from megatrain.checkpoint.store.grid import index_of, ints, overlap, overlapping, region_of
from megatrain.checkpoint.store.manifest import (
    CRC_BYTES,
    DTYPES,
    HEADER,
    MAX_HEADER_BYTES,
    TENSORS,
    ArraySpec,
    Index,
    Key,
    Manifest,
    StoredArray,
    chunk_file,
    crc_hex,
    merge_records,
    zarr_array,
    zarr_group,
)
from megatrain.checkpoint.store.parts import ReadPart, digest
from megatrain.checkpoint.store.tree import Tree
from megatrain.disk.durable import fsync_folder, write_durably
from megatrain.disk.small import kind_of

_MAX_MANIFEST_BYTES = 2**28  # some million chunks; a file that claims more isn't read into memory


class CheckpointWriter:
    """One rank's side of one save, in a hidden folder beside the checkpoints that ``commit`` gives its name.

    Args:
        folder: the run's checkpoints; made by ``prepare`` if it isn't there.
        step: number of optimizer steps taken.
        run_id: of the run that saves; stored with every array.

    ``notes``: what a person should know of what lay in the way, for the log.
    """

    def __init__(self, folder: Path, step: int, run_id: str):
        self.folder, self.step, self.run_id = folder, step, run_id
        self.partial = layout.partial_path(folder, step)
        self.notes: list[str] = []
        self._written: dict[Key, StoredArray] = {}
        self._files = Files()

    def prepare(self) -> list[Path]:
        """Rank 0, first: removes what killed saves left in the folder and makes room for this one.

        Returns the removed stumps, for the log. One save at a time: the stump of another is taken for dead.

        Raises:
            CheckpointError: the folder can't be made or cleaned.
        """
        with explained(f"prepare a checkpoint in {self.folder}"):
            self.folder.mkdir(parents=True, exist_ok=True)
            removed = layout.clean_stumps(self.folder, self.notes)
            self.partial.mkdir()
            fsync_folder(self.folder.parent)
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
        """Begins to write one chunk; ``records`` waits until it is on disk, and until then ``part`` must not change.

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
                already, or an error of the file system (of this part or one before).
        """
        dtype = part.dtype.name if part.dtype in DTYPES.values() else str(part.dtype)
        chunk_dims = ints(part.shape if chunk_shape is None else chunk_shape)
        spec = ArraySpec(kind, name, dtype, ints(full_shape), chunk_dims)
        index = index_of(spec, part.shape, ints(offset))
        array = self._written.setdefault(spec.key, StoredArray(spec, {}))
        file = chunk_file(index)
        if array.spec != spec or file in array.chunks:
            raise CheckpointError(f"{spec.label}: the part at {tuple(offset)} was written already or as {array.spec}")
        place = self.partial / spec.folder
        with explained(f"write {spec.label} to {place}"):
            place.mkdir(parents=True, exist_ok=True)
        array.chunks[file] = ""  # told by the thread that writes it
        self._files.write(place / file, spec.label, padded(part, spec), lambda crc: array.chunks.update({file: crc}))
        if not any(index):  # exactly one rank has the first chunk: it describes the array to other programs
            header = zarr_array(spec, self.step, self.run_id)
            self._files.write(place / HEADER, spec.label, header, lambda crc: setattr(array, "header", crc))

    def records(self) -> list[dict[str, Any]]:
        """What this rank wrote, as JSON, once it is on disk; ``commit`` wants those of all ranks.

        Raises:
            CheckpointError: a part could not be written.
        """
        self._files.wait()
        return [array.to_json() for array in self._written.values()]

    def commit(
        self, all_records: Iterable[Mapping[str, Any]], state: Mapping[str, Any], versions: Mapping[str, str]
    ) -> Path:
        """Rank 0, last: makes the checkpoint exist, all at once, and returns its folder.

        An older checkpoint of the same step is replaced, and deleted only when the new one is in place. What has its
        name and does not look whole is set aside: it may have lost its manifest alone.

        Args:
            all_records: the ``records()`` of every rank, in one list.
            state: all that is not a tensor, as JSON with string keys (tuples come back as lists).
            versions: of the programs that took part, by name.

        Raises:
            CheckpointError: a chunk is missing, was written twice or has another size on disk; ``state`` is not
                JSON; an error of the file system. What was committed before is untouched.
        """
        arrays = merge_records(all_records)
        groups = group_headers(self.step, self.run_id, versions, state, arrays)
        crcs = {kind: crc_hex(header) for kind, header in groups.items()}
        manifest = Manifest(self.step, self.run_id, dict(versions), dict(state), crcs, arrays)
        content = manifest.to_bytes()
        Tree(self.partial).require((array.spec, array.spec.indices()) for array in arrays.values())
        with explained(f"commit the checkpoint {self.partial}"):
            for kind, header in groups.items():
                place = self.partial / TENSORS / kind
                place.mkdir(exist_ok=True)
                self._files.write(place / HEADER, f"the group {kind or TENSORS}", header, lambda crc: None)
            self._files.wait()
            self._files.sync_folders(Path(place) for place, _, _ in os.walk(self.partial))
            write_durably(self.partial / layout.MANIFEST, content)
            final = self.folder / layout.checkpoint_name(self.step)
            if note := layout.publish(self.folder, self.step, is_worthless=problem_of(final) is None):
                self.notes.append(note)
            return final

    def close(self) -> None:
        """Every rank, at the end: waits for what is being written, whatever becomes of it."""
        self._files.close()

    def discard(self) -> None:
        """Rank 0, after a save that failed and when no rank writes any more: gives its disk space back."""
        shutil.rmtree(self.partial, ignore_errors=True)


class CheckpointReader:
    """A committed checkpoint. Every byte that ``read`` returns was checked, unless ``parts`` are asked for.

    Safe to use from several threads.

    Args:
        path: the checkpoint's folder, as ``newest_checkpoint`` gives it.

    Raises:
        CheckpointError: no such folder, not committed, or a manifest that is damaged, of a newer version, of another
            step than the folder's name says, or that names places outside the folder.
    """

    def __init__(self, path: Path):
        self.path = path
        with explained(f"look at {path}"):
            if not os.path.lexists(path):
                raise CheckpointError(f"no such checkpoint: {path}")
            if not path.is_dir():
                raise CheckpointError(f"{path} is {kind_of(os.lstat(path))}, not the folder of a checkpoint")
        self._tree = Tree(path)
        if not layout.is_committed(path):
            raise CheckpointError(f"{path} was never committed: it has no {layout.MANIFEST}{_cure(path)}")
        try:
            manifest = persistently(self._manifest)
        except CheckpointError as error:
            raise type(error)(f"{path / layout.MANIFEST}: {error}") from error
        self.step, self.run_id, self.versions = manifest.step, manifest.run_id, manifest.versions
        self.state = manifest.state
        self._arrays, self._groups = manifest.arrays, manifest.groups
        self._checked_headers: set[Key] = set()
        self.arrays = {key: array.spec for key, array in manifest.arrays.items()}

    def require_files(self) -> None:
        """Checks that all chunks are there in their right sizes, and all ``zarr.json`` undamaged; reads no chunk.

        Raises:
            CheckpointError: names all that are missing, of another size or behind a link.
        """
        self._tree.require((array.spec, array.spec.indices()) for array in self._arrays.values())
        for kind, crc in self._groups.items():
            self._require_header(f"the group {kind or TENSORS}", f"{TENSORS}/{kind}", crc)
        for array in self._arrays.values():
            self._require_header(array.spec.label, array.spec.folder, array.header)

    def read(
        self,
        kind: str,
        name: str,
        offset: Sequence[int] | None = None,
        shape: Sequence[int] | None = None,
        out: Array | None = None,
        parts: list[ReadPart] | None = None,
    ) -> Array:
        """A region of an array, by default all of it; opens only the chunks that overlap it.

        Args:
            offset: of the region in the full array; by default its start.
            shape: of the region; by default all that is there from ``offset`` on.
            out: of ``shape`` and the stored dtype, to be filled instead of a new array; undefined after an error.
            parts: is given what was read of chunks of which whole rows, but not all, belong to the region. They are
                **not** checked: that is for the caller, with what others read of them. None: all is checked here.

        Returns: ``out``, or a new array.

        Raises:
            CheckpointError: no such array; a region that leaves it; chunks that are missing, of another size or
                behind a link (all of them named at once, before memory is taken; the first one where ``out`` is
                given); one that is damaged or not the one that was saved.
        """
        if (kind, name) not in self._arrays:
            raise CheckpointError(f"{self.path} holds no {kind} of {name}")
        array = self._arrays[kind, name]
        spec = array.spec
        start = (0,) * len(spec.shape) if offset is None else ints(offset)
        rest = (dim - begin for dim, begin in zip(spec.shape, start, strict=False))  # overlapping checks the lengths
        size = tuple(rest) if shape is None else ints(shape)
        indices = overlapping(spec, start, size)
        if spec.key not in self._checked_headers:
            self._require_header(spec.label, spec.folder, array.header)
            self._checked_headers.add(spec.key)
        if out is None:
            self._tree.require([(spec, indices)])
        region: Array = self._memory(spec, size) if out is None else out
        assert (region.shape, region.dtype) == (size, DTYPES[spec.dtype]), "out does not fit the region"
        for index in indices:
            source, target = overlap(spec, index, start, size)
            part = region[(*target, ...)]  # the dots keep a view of an array without dims
            if parts is not None and (found := persistently(partial(self._read_rows, array, index, source, part))):
                parts.append(found)
                continue
            persistently(partial(self._read_chunk, array, index, source, part))
        return region

    def check(self, kind: str, name: str, index: Index) -> int:
        """Reads a chunk and keeps nothing of it; returns its bytes.

        Raises:
            CheckpointError: it is missing, damaged, or not the one that was saved.
        """
        persistently(partial(self._read_chunk, self._arrays[kind, name], index, (), None))
        return self.arrays[kind, name].file_bytes - CRC_BYTES

    def _memory(self, spec: ArraySpec, size: tuple[int, ...]) -> Array:
        try:
            return new_array(size, DTYPES[spec.dtype])
        except CheckpointError as error:
            raise CheckpointError(f"{spec.label} in {self.path}: {error}") from error

    def _manifest(self) -> Manifest:
        with explained("read it"):
            manifest = Manifest.from_bytes(self._tree.content(layout.MANIFEST, _MAX_MANIFEST_BYTES))
        if layout.step_of(os.path.basename(self._tree.root)) not in (None, manifest.step):
            raise CheckpointError(f"it belongs to step {manifest.step}, not to this folder")
        return manifest

    def _read_chunk(self, array: StoredArray, index: Index, source: tuple[slice, ...], part: Array | None) -> None:
        file = chunk_file(index)
        crc = self._tree.read_chunk(array.spec, file, source, part)
        if crc != array.chunks[file]:
            raise CheckpointError(
                f"{array.spec.label}: {self.path}/{array.spec.folder}/{file} is whole but not the chunk that was "
                f"saved here: {self._origin(crc)}"
            )

    def _read_rows(self, array: StoredArray, index: Index, source: tuple[slice, ...], part: Array) -> ReadPart | None:
        """None: not a part that can be read alone, or there is something wrong: to be read with its chunk."""
        spec, file = array.spec, chunk_file(index)
        is_part = part.shape[1:] == spec.chunk_shape[1:] and part.shape != spec.chunk_shape
        if not is_part or not part.flags.c_contiguous or region_of(spec, index)[1] != spec.chunk_shape:
            return None
        found = self._tree.read_rows(spec, file, source[0].start, part)
        if found is None or found[1] != array.chunks[file]:
            return None
        start = source[0].start * (part.nbytes // part.shape[0])
        place = digest(f"{spec.folder}/{file}")
        return ReadPart(place, int(found[1], 16), spec.file_bytes - CRC_BYTES, start, part.nbytes, found[0])

    def _origin(self, crc: str) -> str:
        """Where a foreign chunk comes from, as far as this checkpoint and those beside it know."""
        for other in self._arrays.values():
            for file, known in other.chunks.items():
                if known == crc:
                    return f"it is {file} of {other.spec.label}"
        for path in layout.list_checkpoints(self.path.parent):
            with suppress(CheckpointError):
                manifest = CheckpointReader(path)
                if any(crc in array.chunks.values() for array in manifest._arrays.values()):
                    return f"it is that of step {manifest.step}, run {manifest.run_id}"
        return "it comes from another place, step or run"

    def _require_header(self, label: str, folder: str, crc: str | None) -> None:
        persistently(lambda: self._check_header(label, folder, crc))

    def _check_header(self, label: str, folder: str, crc: str | None) -> None:
        relative = f"{folder}/{HEADER}"
        with explained(f"read {label} from {self.path}/{relative}"):
            if crc_hex(self._tree.content(relative, MAX_HEADER_BYTES)) != crc:
                raise CheckpointError(f"{label}: {self.path}/{relative} is damaged: it is not what was saved here")


def problem_of(path: Path) -> str | None:
    """Why a checkpoint can't be loaded, as far as that shows without reading its chunks; None: it looks whole."""
    try:
        CheckpointReader(path).require_files()
    except CheckpointError as error:
        return str(error)
    return None


def _cure(path: Path) -> str:
    """What can be done about a folder that may have been a checkpoint."""
    with suppress(OSError):
        if layout.step_of(path.name) is not None and (path / TENSORS).is_dir():
            return f"; if it was lost: python launch/checkpoint.py rebuild {path}"
    return ""


def group_headers(
    step: int, run_id: str, versions: Mapping[str, Any], state: Mapping[str, Any], arrays: Collection[Key]
) -> dict[str, bytes]:
    """The ``zarr.json`` of each kind of arrays and, under "", of all: this one repeats what a lost manifest said.

    Raises:
        CheckpointError: ``state`` or ``versions`` is not JSON.
    """
    names = [f"{kind}/{name}" for kind, name in arrays]
    attributes = {"step": step, "run_id": run_id, "versions": versions, "state": state, "arrays": names}
    return {"": zarr_group(attributes), **{kind: zarr_group({}) for kind, _ in arrays}}
