"""A config as text: for the eye, with origins, and for the run folder."""

from collections.abc import Iterator, Mapping
from typing import Any

from megatrain.config.load import DEFAULT, Resolved
from megatrain.config.reading.yaml_text import many_lines, one_line
from megatrain.config.schema import RunConfig

_WIDEST_COLUMN = 60  # one long path should not push all comments out of sight


def format_config(resolved: Resolved) -> str:
    """The whole config as YAML; a comment on every line says where its value comes from."""
    lines = list(_lines(resolved.config.model_dump(mode="json"), resolved.origins))
    column = max(len(text) for text, origin in lines if origin and len(text) <= _WIDEST_COLUMN)
    return "".join(f"{text:<{column}}  # {origin}\n" if origin else f"{text}\n" for text, origin in lines)


def to_yaml(config: RunConfig) -> str:
    """``config`` as YAML, for `config.yaml` of a run folder. ``load.from_yaml`` reads it back."""
    return many_lines(config.model_dump(mode="json"))


def _lines(values: dict[str, Any], origins: Mapping[str, str], prefix: str = "") -> Iterator[tuple[str, str | None]]:
    """(line, origin) of each value; a section's own line has no origin."""
    indent = "  " * prefix.count(".")
    for name, value in values.items():
        text = f"{indent}{one_line(name)}:"
        if isinstance(value, dict) and value:
            yield text, None
            yield from _lines(value, origins, f"{prefix}{name}.")
        else:
            yield f"{text} {one_line(value)}", _origin(prefix + name, origins)


def _origin(key: str, origins: Mapping[str, str]) -> str:
    """Where a value comes from, or what it was made from: a source can be written as its folder alone."""
    while key not in origins and "." in key:
        key = key.rpartition(".")[0]
    return origins.get(key, DEFAULT)
