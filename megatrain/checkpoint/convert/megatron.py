"""Megatron-core's distributed checkpoints: the weights of its GPT model in ``torch_dist``."""

import json
import re
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from megatrain.checkpoint.convert.errors import ConversionError
from megatrain.checkpoint.convert.families.megatron_core import EXTRA_STATES, MEGATRON_CORE
from megatrain.checkpoint.convert.model_file import read_model, write_model
from megatrain.checkpoint.convert.pickles import require_trust
from megatrain.checkpoint.convert.table import WEIGHT, Line
from megatrain.checkpoint.convert.torch_dist import METADATA, TorchDistReader, TorchDistWriter
from megatrain.config.schema import ModelConfig

CONFIG, COMMON, LATEST = "metadata.json", "common.pt", "latest_checkpointed_iteration.txt"
_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_LAYER = re.compile(r"(decoder\.layers\.)(\d+)\.")


def iteration_folder(path: Path) -> Path | None:
    """``path`` itself or the iteration in it that is the latest, if that is a checkpoint of this kind."""
    latest = path / LATEST
    if latest.is_file():
        text = latest.read_text(encoding="utf-8").strip()
        path = path / f"iter_{int(text):07d}" if text.isdigit() else path
    return path if (path / CONFIG).is_file() and (path / METADATA).is_file() else None


class MegatronReader:
    """The model in an ``iter_…`` folder, its layers stacked in one tensor or each under its own key.

    Args:
        model_file: the config that says what model it is; default: ``model.yaml`` in or beside the folder.
    Raises:
        ConversionError: damaged, not trusted, or of another backend.
    """

    kinds: tuple[str, ...] = (WEIGHT,)
    table: tuple[Line, ...] = MEGATRON_CORE

    def __init__(self, folder: Path, model_file: Path | None, trust: bool):
        require_trust(folder / METADATA, trust)
        backend = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("sharded_backend")
        if backend != "torch_dist":
            raise ConversionError(f"{folder / CONFIG}: sharded_backend {backend!r} is not read here; torch_dist is")
        self.path = folder
        self.model = read_model(folder.parent, model_file)
        self._tensors = TorchDistReader(folder)
        number = re.fullmatch(r"iter_(\d+)", folder.name)
        self.step = int(number[1]) if number else 0

    def read(self, kind: str, name: str) -> Tensor:
        """A weight of one layer."""
        key, layer = _key(name)
        if layer is not None and self._tensors.shape(key) is not None:
            return self._tensors.read(key, layer)
        return self._tensors.read(name)

    def names(self) -> Collection[str]:
        """Of the weights, layer by layer; optimizer states are left where they are."""
        found = []
        for key in self._tensors.entries:
            shape = self._tensors.shape(key)
            if shape is None or key.startswith("optimizer."):
                continue
            if key.startswith("decoder.layers.") and not _LAYER.match(key):
                rest = key.removeprefix("decoder.layers.")
                found += [f"decoder.layers.{layer}.{rest}" for layer in range(shape[0])]
            else:
                found.append(key)
        return found


class MegatronWriter:
    """Writes ``folder/iter_…`` as ``megatron.core.dist_checkpointing`` and Megatron-LM read it.

    Layers are stacked along a first dim, as Megatron-core stacks the equal layers of a model.
    """

    kinds: tuple[str, ...] = (WEIGHT,)
    table: tuple[Line, ...] = MEGATRON_CORE

    def __init__(self, folder: Path, model: ModelConfig, dtype: torch.dtype, file_bytes: int, step: int):
        self.dtype, self._model, self._step = dtype, model, step
        self._root, self._folder = folder, folder / f"iter_{step:07d}"
        self._file_bytes = file_bytes

    def begin(self, shapes: dict[str, torch.Size]) -> None:
        """Writes all but the tensors."""
        self._folder.mkdir(parents=True)
        write_model(self._root, self._model)
        (self._folder / CONFIG).write_text(json.dumps(_BACKENDS), encoding="utf-8")
        (self._root / LATEST).write_text(str(self._step), encoding="utf-8")
        torch.save({"iteration": self._step, "checkpoint_version": 3.0}, self._folder / COMMON)
        self._tensors = TorchDistWriter(self._folder, self._file_bytes)

    def write(self, kind: str, name: str, tensor: Tensor) -> None:
        """The next weight."""
        tensor = tensor.to(self.dtype)
        key, layer = _key(name)
        if layer is None:
            self._tensors.write(key, tensor, [0] * tensor.dim(), list(tensor.shape))
        else:
            shape = [self._model.num_layers, *tensor.shape]
            self._tensors.write(key, tensor[None], [layer] + [0] * tensor.dim(), shape)

    def finish(self) -> None:
        """Writes the empty extra states and the metadata."""
        layers = self._model.num_layers
        for key in EXTRA_STATES:
            for layer in range(layers):
                self._tensors.write_object(f"{key}/shard_{layer}_{layers}", [None])
        self._tensors.finish()


def _key(name: str) -> tuple[str, int | None]:
    """The key under which all layers are stacked, and the layer."""
    layer = _LAYER.match(name)
    return (_LAYER.sub(r"\1", name), int(layer[2])) if layer else (name, None)
