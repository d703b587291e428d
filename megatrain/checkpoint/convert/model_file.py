"""``model.yaml``: the model's part of a config, beside weights in formats that do not say what model they are."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from megatrain.checkpoint.convert.errors import ConversionError
from megatrain.checkpoint.convert.model_check import resolved, said
from megatrain.config.schema import ModelConfig
from megatrain.config.yaml_text import Loader

NAME = "model.yaml"
_MAX_BYTES = 2**20


def write_model(folder: Path, model: ModelConfig) -> None:
    """Writes ``folder/model.yaml``."""
    text = yaml.safe_dump({"model": model.model_dump(mode="json")}, sort_keys=False)
    (folder / NAME).write_text(text, encoding="utf-8")


def read_model(folder: Path, given: Path | None) -> ModelConfig:
    """The resolved model of a config file that was given, or else of ``folder/model.yaml``.

    Raises:
        ConversionError: there is neither, or it holds no valid model.
    """
    path = given or folder / NAME
    try:
        if path.is_file() and path.stat().st_size > _MAX_BYTES:
            raise ConversionError(f"{path} is larger than {_MAX_BYTES} bytes: no config is")
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError as error:
        raise ConversionError(f"{path} is missing: --model names a config file that says what model it is") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path} holds no valid section `model`: {error!s:.500}") from error
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise ConversionError(f"{path} holds no valid section `model`")
    return model_of(values["model"], str(path))


def model_of(values: Any, where: str) -> ModelConfig:
    """The resolved model of the fields that a file has.

    Raises:
        ConversionError: they are not those of a model; ``where`` names the file.
    """
    try:
        return resolved(ModelConfig.model_validate(values), where)
    except ValidationError as error:
        raise ConversionError(f"{where} holds no valid section `model`: {said(error)}") from error


class _Loader(Loader):
    """Without aliases: a few lines of them stand for more than memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """See PyYAML."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases are not read here: write the value out{self.peek_event().start_mark}")
        return super().compose_node(parent, index)
