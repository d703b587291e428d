"""The files of torch.distributed.checkpoint, which Megatron-core calls ``torch_dist``, one tensor at a time.

``__0_0.distcp`` and so on: the pieces of tensors, each as ``torch.save`` writes it, one behind the other.
``.metadata``: a pickle that says which piece of which tensor stands where.
"""

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata, planner

from megatrain.convert.checksums import require_checksums
from megatrain.convert.errors import ConversionError
from megatrain.convert.pickles import KnownClasses

METADATA = ".metadata"
_KNOWN = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module, names in {
        metadata: (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        ),
        filesystem: ("_StorageInfo",),
        planner: ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"),
    }.items()
    for name in names
}  # fmt: skip
_KNOWN |= {"torch.Size": torch.Size, "torch.serialization._get_layout": torch.serialization._get_layout}
_KNOWN |= {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class TorchDistReader:
    """The tensors of a folder.

    Raises:
        ConversionError: ``.metadata`` is missing, damaged, or names other classes or files elsewhere.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            with open(folder / METADATA, "rb") as file:
                found = KnownClasses(file, _KNOWN).load()
            self.entries: dict[str, Any] = found.state_dict_metadata
            self._places: dict[Any, Any] = found.storage_data
            elsewhere = [
                place.relative_path
                for place in self._places.values()
                if Path(place.relative_path).name != place.relative_path
            ]
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError) as error:
            raise ConversionError(f"{folder / METADATA}: {error}") from error
        if elsewhere:
            raise ConversionError(f"{folder / METADATA} names files outside its folder: {elsewhere[0]!r:.100}")

    def shape(self, key: str) -> torch.Size | None:
        """The shape of a tensor; None if there is none of that key."""
        entry = self.entries.get(key)
        return entry.size if isinstance(entry, metadata.TensorStorageMetadata) else None

    def read(self, key: str, first: int | None = None) -> Tensor:
        """A tensor, or only the part number ``first`` along its first dim; opens only the pieces that it needs.

        Raises:
            ConversionError: a piece is missing or damaged, or the pieces do not fill the tensor.
        """
        entry = self.entries[key]
        whole = entry.size if first is None else torch.Size([1, *entry.size[1:]])
        result, filled = torch.empty(whole, dtype=entry.properties.dtype), 0
        for chunk in entry.chunks:
            offsets = list(chunk.offsets)
            piece_slice = [slice(None)] * len(offsets)
            if first is not None:
                if not offsets[0] <= first < offsets[0] + chunk.sizes[0]:
                    continue
                piece_slice[0] = slice(first - offsets[0], first - offsets[0] + 1)
                offsets[0] = 0
            piece = self._piece(key, chunk)[tuple(piece_slice)] if chunk.sizes else self._piece(key, chunk)
            place = tuple(slice(start, start + size) for start, size in zip(offsets, piece.shape, strict=True))
            result[place] = piece
            filled += piece.numel()
        if filled != result.numel():
            raise ConversionError(f"{self.folder}: {key}: its pieces hold {filled} of {result.numel()} elements")
        return result if first is None else result[0]

    def _piece(self, key: str, chunk: Any) -> Tensor:
        index = metadata.MetadataIndex(key, chunk.offsets)
        try:
            place = self._places[index]
            with open(self.folder / place.relative_path, "rb") as file:
                file.seek(place.offset)
                data = file.read(place.length)
            require_checksums(io.BytesIO(data), f"{self.folder / place.relative_path}: {key} at {tuple(chunk.offsets)}")
            piece = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except (KeyError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ConversionError(f"{self.folder}: {key} at {tuple(chunk.offsets)}: {error}") from error
        if not isinstance(piece, Tensor) or piece.shape != chunk.sizes:
            raise ConversionError(f"{self.folder}: {key} at {tuple(chunk.offsets)} is not what {METADATA} says")
        return piece


class TorchDistWriter:
    """Writes pieces as they come, into files of about ``file_bytes``; ``finish`` writes ``.metadata``."""

    def __init__(self, folder: Path, file_bytes: int):
        self.folder, self._file_bytes = folder, file_bytes
        self._entries: dict[str, Any] = {}
        self._places: dict[Any, Any] = {}
        self._number = -1
        self._file: BinaryIO | None = None

    def write(self, keys: Sequence[str], piece: Tensor, offsets: list[int], shape: list[int]) -> None:
        """A piece of a tensor of ``shape``, which stands once on the disk and is found under each of ``keys``."""
        offsets_size = torch.Size(offsets)
        properties = metadata.TensorProperties(dtype=piece.dtype)
        place = self._append(piece.clone(memory_format=torch.contiguous_format))
        for key in keys:
            entry = self._entries.setdefault(key, metadata.TensorStorageMetadata(properties, torch.Size(shape), []))
            index = metadata.MetadataIndex(key, offsets_size, len(entry.chunks))
            entry.chunks.append(metadata.ChunkStorageMetadata(offsets_size, piece.shape))
            self._places[index] = place

    def write_object(self, key: str, value: Any) -> None:
        """Something else than a tensor."""
        self._entries[key] = metadata.BytesStorageMetadata()
        self._places[metadata.MetadataIndex(key)] = self._append(value)

    def finish(self) -> None:
        """Closes the files and says what is where."""
        if self._file is not None:
            self._file.close()
        found = metadata.Metadata(self._entries, None, self._places, metadata.StorageMeta())
        with open(self.folder / METADATA, "wb") as file:
            pickle.dump(found, file)

    def _append(self, value: Any) -> Any:
        if self._file is None or self._file.tell() >= self._file_bytes:
            if self._file is not None:
                self._file.close()
            self._number += 1
            self._file = open(self.folder / f"__0_{self._number}.distcp", "wb")  # noqa: SIM115
        start = self._file.tell()
        buffer = io.BytesIO()
        torch.save(value, buffer)
        self._file.write(buffer.getbuffer())
        return filesystem._StorageInfo(f"__0_{self._number}.distcp", start, self._file.tell() - start)
