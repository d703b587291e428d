"""Safetensors files, written tensor by tensor: the library's own writer wants a whole file's tensors at once."""

import json
import math
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatrain.convert.errors import ConversionError
from megatrain.convert.huggingface.sharded_files import ShardedFiles, read_index

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_TYPES = {code: dtype for dtype, code in _CODES.items()} | {"F64": torch.float64}


class SafetensorsReader(ShardedFiles):
    """The tensors of a folder with ``model.safetensors``, or with shards and their index.

    Raises:
        ConversionError: neither is there, or the index is damaged or names files elsewhere.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, Any] = {}
        if (folder / SINGLE).is_file():  # before an index, as transformers has it
            self.file_of = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        elif (folder / INDEX).is_file():
            self.file_of = read_index(folder / INDEX)
        else:
            raise ConversionError(f"{folder} holds neither {SINGLE} nor {INDEX}")

    def read(self, name: str) -> Tensor:
        """A tensor, copied from the file; nothing else of it is read."""
        file = self.file_with(name)
        try:
            return self._open(file).get_tensor(name)
        except SafetensorError as error:
            raise ConversionError(f"{self.folder / file}: {name}: {error}") from error

    def dtype_of(self, name: str) -> torch.dtype:
        """
        Raises:
            ConversionError: of no type in which weights are read.
        """
        file = self.file_with(name)
        try:
            code = self._open(file).get_slice(name).get_dtype()
        except SafetensorError as error:
            raise ConversionError(f"{self.folder / file}: {name}: {error}") from error
        if code not in _TYPES:
            raise ConversionError(f"{self.folder / file}: {name} is of type {code}; read are {', '.join(_TYPES)}")
        return _TYPES[code]

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.folder / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ConversionError(f"{self.folder / file}: {error}") from error
        return self._files[file]


class SafetensorsWriter:
    """Writes tensors of known names and shapes, in their order, into shards of at most ``shard_bytes`` each."""

    def __init__(self, folder: Path, dtype: torch.dtype, shapes: dict[str, torch.Size], shard_bytes: int):
        self.folder, self.dtype = folder, dtype
        shards: list[dict[str, torch.Size]] = [{}]
        size = 0
        for name, shape in shapes.items():
            num_bytes = self._num_bytes(shape)
            if shards[-1] and size + num_bytes > shard_bytes:
                shards.append({})
                size = 0
            shards[-1][name] = shape
            size += num_bytes
        count = len(shards)
        files = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        self._shards = dict(zip(files, shards, strict=True))
        self._order = [(file, name, shape) for file, shard in self._shards.items() for name, shape in shard.items()]
        self._next = 0
        self._file: str | None = None
        self._open_file: BinaryIO | None = None

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor; its name and shape are those that were announced."""
        file, expected, shape = self._order[self._next]
        assert (name, tensor.shape) == (expected, shape), f"{name} {tuple(tensor.shape)}: expected {expected} {shape}"
        self._next += 1
        if file != self._file:
            self.close_file()
            self._file = file
            self._open_file = open(self.folder / file, "wb")  # noqa: SIM115
            self._open_file.write(self._header(self._shards[file]))
        assert self._open_file is not None
        self._open_file.write(tensor.to(self.dtype).contiguous().flatten().view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """Closes the last file and writes the index where there are several."""
        assert self._next == len(self._order), "tensors are missing"
        self.close_file()
        if len(self._shards) > 1:
            total = sum(self._num_bytes(shape) for _, _, shape in self._order)
            index = {"metadata": {"total_size": total}, "weight_map": {name: file for file, name, _ in self._order}}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")

    def close_file(self) -> None:
        """Gives the file that is being written back."""
        if self._open_file is not None:
            self._open_file.close()
            self._open_file = None

    def _num_bytes(self, shape: torch.Size) -> int:
        return math.prod(shape) * self.dtype.itemsize

    def _header(self, shard: dict[str, torch.Size]) -> bytes:
        """Length (8 bytes, little endian) and JSON: where each tensor's bytes stand; padded to whole 8 bytes."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in shard.items():
            end = offset + self._num_bytes(shape)
            entries[name] = {"dtype": _CODES[self.dtype], "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text
