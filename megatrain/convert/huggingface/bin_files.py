"""``pytorch_model.bin``: Hugging Face's older files, which are pickles of tensors."""

import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from megatrain.convert.checksums import require_checksums
from megatrain.convert.errors import ConversionError
from megatrain.convert.huggingface.sharded_files import ShardedFiles, read_index

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class BinReader(ShardedFiles):
    """The tensors of a folder with ``pytorch_model.bin``, or with shards and their index; nothing but tensors is
    unpickled.

    Raises:
        ConversionError: a file is damaged, holds other things, or the index names files elsewhere.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, dict[str, Tensor]] = {}
        if (folder / SINGLE).is_file():  # before an index, as transformers has it
            self.file_of = dict.fromkeys(self._open(SINGLE), SINGLE)
        else:
            self.file_of = read_index(folder / INDEX)

    def read(self, name: str) -> Tensor:
        """A tensor, read from the file when it is looked at."""
        file = self.file_with(name)
        if name not in self._open(file):
            raise ConversionError(f"{self.folder / file} does not hold {name}, which the index says it does")
        return self._open(file)[name]

    def dtype_of(self, name: str) -> torch.dtype:
        """
        Raises:
            ConversionError: of no type in which weights are read.
        """
        dtype = self.read(name).dtype
        if dtype not in _TYPES:
            raise ConversionError(f"{self.folder / self.file_with(name)}: {name} is of type {dtype}, which is not read")
        return dtype

    def _open(self, file: str) -> dict[str, Tensor]:
        if file not in self._files:
            path = self.folder / file
            require_checksums(path)
            try:  # files of before PyTorch 1.6 can't be mapped
                found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            except pickle.UnpicklingError as error:
                raise ConversionError(f"{path} holds more than tensors and is not opened: {error}") from error
            except (RuntimeError, OSError, EOFError) as error:
                raise ConversionError(f"{path}: {error}") from error
            if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
                raise ConversionError(f"{path} is no dict of tensors")
            self._files[file] = found
        return self._files[file]
