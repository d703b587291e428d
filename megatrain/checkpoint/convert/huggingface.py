"""Models in Hugging Face's folders: config.json, safetensors, generation_config.json, tokenizer."""

import json
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain.checkpoint.convert import bin_files, safetensors_files
from megatrain.checkpoint.convert.bin_files import BinReader
from megatrain.checkpoint.convert.errors import ConversionError
from megatrain.checkpoint.convert.hf_config import (
    config_from_model,
    family_of_config,
    family_of_model,
    model_from_config,
)
from megatrain.checkpoint.convert.pickles import require_trust
from megatrain.checkpoint.convert.safetensors_files import SafetensorsReader, SafetensorsWriter
from megatrain.config.schema import ModelConfig
from megatrain.engine.kinds import WEIGHT

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
# masks and frequencies that older files hold beside the weights
_BUFFERS = re.compile(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$")
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>")


class HuggingFaceReader:
    """A folder with ``config.json`` and safetensors, or ``pytorch_model.bin`` where there are none.

    Args:
        trust: open the latter, a pickle.
    Raises:
        ConversionError: a file is missing or damaged, or the model is none that is computed here.
    """

    kinds: tuple[str, ...] = (WEIGHT,)
    step = 0

    def __init__(self, folder: Path, vocab_multiple: int = 1, trust: bool = False):
        self.path = folder
        self.config = read_json(folder / CONFIG)
        self.family = family_of_config(self.config)
        self.model, self.table = model_from_config(self.config, vocab_multiple), self.family.lines
        self._tensors = _tensors(folder, trust)
        self._prefix = (
            "" if any(name.startswith(self.family.prefix) for name in self._tensors.names()) else self.family.prefix
        )

    def read(self, kind: str, name: str) -> Tensor:
        """A weight, in the type of the file."""
        return self._tensors.read(name.removeprefix(self._prefix))

    def names(self) -> Collection[str]:
        """Of the weights; a tied head that was stored all the same does not count."""
        tied = {"lm_head.weight"} if self.model.tie_embeddings else set()
        there = {self._prefix + name for name in self._tensors.names() if not _BUFFERS.search(name)}
        return there - tied


def _tensors(folder: Path, trust: bool) -> SafetensorsReader | BinReader:
    pickles = [folder / name for name in (bin_files.INDEX, bin_files.SINGLE) if (folder / name).is_file()]
    if not pickles or any((folder / name).is_file() for name in (safetensors_files.SINGLE, safetensors_files.INDEX)):
        return SafetensorsReader(folder)
    require_trust(pickles[0], trust)
    return BinReader(folder)


class HuggingFaceWriter:
    """Writes a folder that ``from_pretrained`` and serving engines take as it is.

    Args:
        extras: a folder with a tokenizer and perhaps ``generation_config.json``, or a ``tokenizer.json``.
    """

    kinds: tuple[str, ...] = (WEIGHT,)

    def __init__(self, folder: Path, model: ModelConfig, dtype: torch.dtype, shard_bytes: int, extras: Path | None):
        self.folder, self.model, self.dtype, self.extras = folder, model, dtype, extras
        self.family = family_of_model(model)
        self.table = self.family.lines
        self._shard_bytes = shard_bytes
        self._config = config_from_model(model)

    def begin(self, shapes: dict[str, torch.Size]) -> None:
        """Writes all but the weights."""
        self._tensors = SafetensorsWriter(self.folder, self.dtype, shapes, self._shard_bytes)
        special = _copy_tokenizer(self.extras, self.folder) if self.extras is not None else {}
        config = self._config | special | {"dtype": str(self.dtype).removeprefix("torch.")}
        _write_json(self.folder / CONFIG, config | {"torch_dtype": config["dtype"]})
        if not (self.folder / GENERATION).exists():
            _write_json(self.folder / GENERATION, {"_from_model_config": True, **special})

    def write(self, kind: str, name: str, tensor: Tensor) -> None:
        """The next weight."""
        self._tensors.write(name, tensor)

    def finish(self) -> None:
        """Completes the files."""
        self._tensors.finish()


def copy_extras(source: Path, target: Path) -> list[str]:
    """Copies a model's tokenizer and generation config, for the way back; returns their names."""
    found = [name for name in (*TOKENIZER_FILES, GENERATION) if (source / name).is_file()]
    if found:
        target.mkdir(parents=True, exist_ok=True)
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ConversionError: it is not there or none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConversionError(f"{path} is missing") from error
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path} holds no JSON object")
    return value


def _copy_tokenizer(extras: Path, folder: Path) -> dict[str, int]:
    """Copies or makes the tokenizer's files; returns the ids of the special tokens that the config names too."""
    if extras.is_dir():
        if not copy_extras(extras, folder):
            raise ConversionError(f"{extras} holds no tokenizer")
        generation = read_json(extras / GENERATION) if (extras / GENERATION).is_file() else {}
        return {name: generation[name] for name in ("bos_token_id", "eos_token_id") if name in generation}
    from tokenizers import Tokenizer

    shutil.copyfile(extras, folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(extras))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    end = next((token for token in _END_OF_TEXT if tokenizer.token_to_id(token) is not None), None)
    if end is not None:
        settings |= {"bos_token": end, "eos_token": end}
    _write_json(folder / "tokenizer_config.json", settings)
    end_id = None if end is None else tokenizer.token_to_id(end)
    return {} if end_id is None else {"bos_token_id": end_id, "eos_token_id": end_id}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
