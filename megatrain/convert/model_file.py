"""``model.yaml``: the model's part of a config, beside weights in formats that do not say what model they are."""

from pathlib import Path

import yaml
from pydantic import ValidationError

from megatrain.config.reading.yaml_text import StrictYamlLoader
from megatrain.convert.errors import ConversionError
from megatrain.convert.model_check import resolved, said
from megatrain.disk.small import read_regular
from megatrain.spec.older import of_this_version
from megatrain.spec.schema import ModelConfig, ModelSpec

NAME = "model.yaml"


def write_model(folder: Path, model: ModelSpec) -> None:
    """Writes ``folder/model.yaml``."""
    text = yaml.safe_dump({"model": model.model_dump(mode="json")}, sort_keys=False)
    (folder / NAME).write_text(text, encoding="utf-8")


def read_model(folder: Path, given: Path | None) -> ModelSpec:
    """The resolved model of a config file that was given, or else of ``folder/model.yaml``.

    Raises:
        ConversionError: there is neither, or it holds no valid model.
    """
    path = given or folder / NAME
    try:
        values = yaml.load(read_regular(path), StrictYamlLoader)
    except FileNotFoundError as error:
        raise ConversionError(f"{path} is missing: --model names a config file that says what model it is") from error
    except OSError as error:
        raise ConversionError(f"cannot read {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConversionError(f"{path} holds no valid section `model`: {error!s:.500}") from error
    if not isinstance(values, dict):
        raise ConversionError(f"{path} holds no valid section `model`")
    try:
        return resolved(ModelConfig.model_validate(of_this_version(values.get("model"))), str(path))
    except ValidationError as error:
        raise ConversionError(f"{path} holds no valid section `model`: {said(error)}") from error
