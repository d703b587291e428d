"""Configs of tests, whose sections ``model`` are written with dotted keys: such dicts can be put over one another."""

from collections.abc import Mapping
from typing import Any

from megatrain.config.schema import RunConfig
from megatrain.spec.derive import resolve_model
from megatrain.spec.keys import nested
from megatrain.spec.schema import ModelConfig, ModelSpec


def model_spec(fields: Mapping[str, Any]) -> ModelSpec:
    """The resolved model of ``{"attention.num_heads": 4, …}``."""
    return resolve_model(ModelConfig.model_validate(nested(fields)))


def run_config_of(sections: Mapping[str, Any]) -> RunConfig:
    """The config of these sections."""
    written = {name: nested(values) if name == "model" else values for name, values in sections.items()}
    return RunConfig.model_validate(written)
