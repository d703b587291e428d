"""What a checkpoint says about itself: its arrays and their chunks, in the manifest that is written last."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
from awscrt.checksums import crc32c

from megatrain.checkpoint.store.errors import CheckpointError, UnfitError

FORMAT, VERSION = "megatrain-checkpoint", 1
TENSORS = "tensors"
HEADER = "zarr.json"
MAX_HEADER_BYTES = 2**26  # a file that claims more isn't read into memory
CRC_BYTES = 4
DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "int64": np.dtype("<i8")}
# What other readers see where a chunk was lost: never plausible zeros.
_FILL_VALUES: dict[str, str | int] = {"float32": "NaN", "int64": -(2**63)}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")  # no separator and no leading dot: it can't leave its folder
_CRC = re.compile(r"[0-9a-f]{8}")
_TAIL = re.compile(rb',\n"crc32c": "([0-9a-f]{8})"\n}\n')
_TAIL_BYTES = len(b',\n"crc32c": "00000000"\n}\n')
_MAX_DIMS = 32  # NumPy itself ends at 64

Key = tuple[str, str]  # kind and canonical name of an array
Index = tuple[int, ...]  # position of a chunk in the grid


@dataclass(frozen=True)
class ArraySpec:
    """An array of the store: its full, layout-free ``shape``, cut into a regular grid of ``chunk_shape``.

    A chunk that reaches over the upper edge is stored in full, padded with zeros.

    Raises:
        CheckpointError: a name with other characters than letters, digits, ``_ . -``; a dtype that is not stored;
            a dim that is no positive int; chunks larger than the array.
    """

    kind: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        for label in (self.kind, self.name):
            if not isinstance(label, str) or not _NAME.fullmatch(label):
                raise CheckpointError(f"{label!r:.200} is not allowed as the kind or name of a tensor")
        if self.dtype not in DTYPES:
            raise CheckpointError(f"{self.label}: {self.dtype!r:.200} is not stored; these are: {', '.join(DTYPES)}")
        dims_fit = len(self.shape) == len(self.chunk_shape) <= _MAX_DIMS
        if not dims_fit or not all(
            type(dim) is int and type(part) is int and 1 <= part <= dim
            for dim, part in zip(self.shape, self.chunk_shape, strict=True)
        ):
            raise CheckpointError(f"{self.label}: chunks {self.chunk_shape} do not cut an array {self.shape}")

    @property
    def key(self) -> Key:
        """Kind and canonical name."""
        return self.kind, self.name

    @property
    def label(self) -> str:
        """The array in an error message."""
        return f"{self.kind} of {self.name}"

    @property
    def folder(self) -> str:
        """The folder of the array, relative to the checkpoint."""
        return f"{TENSORS}/{self.kind}/{self.name}"

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of chunks along each dim."""
        return tuple(-(-dim // part) for dim, part in zip(self.shape, self.chunk_shape, strict=True))

    @property
    def file_bytes(self) -> int:
        """Size of each chunk file: the data and the CRC behind it."""
        return math.prod(self.chunk_shape) * DTYPES[self.dtype].itemsize + CRC_BYTES

    def indices(self) -> Iterator[Index]:
        """All positions of the grid, lazily: a declared grid may be absurdly large."""
        grid = self.grid
        for flat in range(math.prod(grid)):
            index: list[int] = []
            for num_chunks in reversed(grid):
                flat, position = divmod(flat, num_chunks)
                index.insert(0, position)
            yield tuple(index)


def chunk_file(index: Sequence[int]) -> str:
    """Name of a chunk's file in its array's folder, as Zarr spells it: ``c.0.1``; ``c`` where there are no dims."""
    return ".".join(["c", *map(str, index)])


@dataclass
class StoredArray:
    """An array with the CRC-32C (8 hex digits) of each of its chunks that is known, by the name of the chunk's file.

    ``header``: that of its ``zarr.json``, which is written along with the first chunk; None where it isn't known.
    """

    spec: ArraySpec
    chunks: dict[str, str]
    header: str | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON, for the manifest and for gathering what each rank wrote."""
        return {**asdict(self.spec), "header": self.header, "chunks": self.chunks}

    @classmethod
    def from_json(cls, entry: Any) -> "StoredArray":
        """The inverse of ``to_json``.

        Raises:
            CheckpointError: a field is missing, of another type or not allowed.
        """
        try:
            shape, chunk_shape = (tuple(_typed(entry[field], list, tuple)) for field in ("shape", "chunk_shape"))
            kind, name, dtype = (_typed(entry[field], str) for field in ("kind", "name", "dtype"))
            chunks = _typed(entry["chunks"], dict)
            header = _typed(entry["header"], str, type(None))
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"an array's entry is incomplete or of another type: {error!r}") from error
        spec = ArraySpec(kind, name, dtype, shape, chunk_shape)
        if not all(isinstance(crc, str) and _CRC.fullmatch(crc) for crc in [*chunks.values(), header or "0" * 8]):
            raise CheckpointError(f"{spec.label}: a CRC is not 8 hex digits")
        return cls(spec, chunks, header)

    def require_complete(self) -> None:
        """Checks that the chunks are those of the grid, none less and none more.

        Raises:
            CheckpointError: names the tensor and the first chunks that are missing.
        """
        needed = math.prod(self.spec.grid)
        files = map(chunk_file, self.spec.indices())
        # At most one name more than there are chunks is looked at, however large the grid claims to be.
        missing = list(islice((file for file in islice(files, len(self.chunks) + 1) if file not in self.chunks), 5))
        if missing or len(self.chunks) != needed:
            raise CheckpointError(
                f"{self.spec.label}: {len(self.chunks)} chunks recorded, its grid {self.spec.grid} has {needed}"
                + (f"; missing: {', '.join(missing)}" if missing else "")
            )
        if self.header is None:
            raise CheckpointError(f"{self.spec.label}: the CRC of its {HEADER} is not recorded")


def merge_records(records: Iterable[Mapping[str, Any]]) -> dict[Key, StoredArray]:
    """One entry per array, in the order of their names, from what all ranks wrote.

    Raises:
        CheckpointError: two ranks disagree on an array or wrote the same chunk, or a chunk of a grid was not written.
    """
    merged: dict[Key, StoredArray] = {}
    for record in records:
        part = StoredArray.from_json(record)
        whole = merged.setdefault(part.spec.key, StoredArray(part.spec, {}))
        if whole.spec != part.spec:
            raise CheckpointError(f"{part.spec.label}: ranks disagree on the array: {whole.spec} and {part.spec}")
        if twice := whole.chunks.keys() & part.chunks.keys():
            raise CheckpointError(f"{part.spec.label}: written by two ranks: {', '.join(sorted(twice))}")
        whole.chunks.update(part.chunks)
        whole.header = part.header or whole.header
    for whole in merged.values():
        whole.require_complete()
    return dict(sorted(merged.items()))


@dataclass
class Manifest:
    """Everything about a checkpoint but the tensors' data. ``state`` and ``versions`` are the caller's.

    ``groups``: the CRC-32C of the ``zarr.json`` of each kind of arrays and, under "", of all of them.
    """

    step: int
    run_id: str
    versions: dict[str, str]
    state: dict[str, Any]
    groups: dict[str, str]
    arrays: dict[Key, StoredArray]

    def to_bytes(self) -> bytes:
        """The file: one JSON object whose last field is the CRC-32C of all bytes before that field.

        Raises:
            CheckpointError: ``state`` or ``versions`` is not JSON (NaN and infinity aren't either).
        """
        fields = {"format": FORMAT, "version": VERSION, **vars(self)}
        fields["arrays"] = [array.to_json() for array in self.arrays.values()]
        body = _strict_json(fields).encode().removesuffix(b"}")
        return body + b',\n"crc32c": "%b"\n}\n' % crc_hex(body).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Manifest":
        """The inverse of ``to_bytes``; trusts nothing in ``data``.

        Raises:
            CheckpointError: damaged, of another format or a newer version, or with fields that are not allowed.
        """
        body, tail = data[:-_TAIL_BYTES], _TAIL.fullmatch(data[-_TAIL_BYTES:])
        if tail is None or tail[1].decode() != crc_hex(body):
            raise CheckpointError("damaged: it does not match its own CRC (edited, truncated or bits flipped)")
        try:
            fields = _typed(json.loads(body + b"}"), dict)
            if fields["format"] != FORMAT:
                raise CheckpointError(f"format {fields['format']!r:.200} instead of {FORMAT!r}")
            if _typed(fields["version"], int) > VERSION:
                newer = f"version {fields['version']} is newer than {VERSION}, the last that this megatrain reads"
                raise UnfitError(f"{newer}: update megatrain")
            arrays = [StoredArray.from_json(entry) for entry in _typed(fields["arrays"], list)]
            manifest = cls(
                _typed(fields["step"], int),
                _typed(fields["run_id"], str),
                _typed(fields["versions"], dict),
                _typed(fields["state"], dict),
                _typed(fields["groups"], dict),
                {array.spec.key: array for array in arrays},
            )
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"not a manifest: {error!r:.200}") from error
        if len(manifest.arrays) != len(arrays):
            raise CheckpointError("an array is listed twice")
        for array in arrays:
            array.require_complete()
        if manifest.groups.keys() != {"", *(array.spec.kind for array in arrays)}:
            raise CheckpointError("the groups are not those of the arrays")
        return manifest


def crc_hex(data: bytes) -> str:
    """CRC-32C as the manifest has it."""
    return f"{crc32c(data):08x}"


def zarr_array(spec: ArraySpec, step: int, run_id: str) -> bytes:
    """The ``zarr.json`` (Zarr v3) of an array, by which other programs read it."""
    metadata = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": spec.shape,
        "data_type": spec.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": spec.chunk_shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": _FILL_VALUES[spec.dtype],
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "attributes": {"step": step, "run_id": run_id},
    }
    return json.dumps(metadata, indent=2).encode()


def zarr_group(attributes: Mapping[str, Any]) -> bytes:
    """The ``zarr.json`` of a folder of arrays."""
    return _strict_json({"zarr_format": 3, "node_type": "group", "attributes": attributes}).encode()


def _strict_json(value: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the state of a checkpoint must be JSON: {error}") from error


def _typed(value: Any, *types: type) -> Any:
    if type(value) not in types:  # isinstance would take True for an int
        raise TypeError(f"{value!r:.100} is not of type {types[0].__name__}")
    return value
