"""From a tree of values to a typed config, and from pydantic's errors to problems with a cure."""

import difflib
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatrain.config.fields import Field, all_fields, all_sections, field_of, item_fields, nearest_keys
from megatrain.config.problems import Problem
from megatrain.config.schema import RunConfig
from megatrain.config.source import Node
from megatrain.config.yaml_text import one_line

# the beginning of pydantic's error type -> what is wrong
_MESSAGES = {
    "literal_error": "is not one of the choices",
    "greater_than": "is too small",
    "less_than": "is too large",
    "finite_number": "is not a finite number",
    "string_pattern": "has characters that are not allowed",
    "string_too_short": "is empty",
    "missing": "is not set",
    "value_error": "is not a weight",
}


def validate(tree: Node) -> tuple[RunConfig, list[Problem], set[str]]:
    """The typed config of ``tree``, its problems, and the dotted keys whose values mean nothing.

    With problems, the config has defaults in place of what is wrong. The key that a mistyped one was likely
    meant to be is unusable as well: its value is not what the user wanted.
    """
    values = _without_empty_sections(tree.plain())
    try:
        return RunConfig.model_validate(values), [], set()
    except ValidationError as error:
        details = error.errors(include_url=False)
    problems, unusable = [], set()
    for detail in details:
        path = [str(part) for part in detail["loc"] if part != "[key]"]
        key = ".".join(path)
        unusable.add(key)
        if detail["type"] == "extra_forbidden":
            problem = _unknown_key(key, detail["input"])
            unusable.update(nearest_keys(key, all_fields())[:1])
        else:
            problem = _wrong_value(key, detail)
        problems.append(Problem(key, detail["input"], *problem, tree.origin_of(path)))
        _remove(values, path[:-1] if detail["type"] == "missing" else path)
    return RunConfig.model_validate(values), problems, unusable


def _without_empty_sections(values: dict[str, Any]) -> dict[str, Any]:
    """A section above nothing but comments reads as null, and means: nothing set."""
    may_be_empty = {*all_sections(), "deepspeed"}
    return {key: value for key, value in values.items() if value is not None or key not in may_be_empty}


def _remove(values: dict[str, Any], path: list[str]) -> None:
    for part in path[:-1]:
        if not isinstance(values.get(part), dict):  # the item of a list, or a short form: all of it goes
            path = [*path[: path.index(part)], part]
            break
        values = values[part]
    values.pop(path[-1], None)


def _unknown_key(key: str, value: Any) -> tuple[str, str, str]:
    """(message, allowed, cure) of a key that the schema does not have."""
    section, _, name = key.rpartition(".")
    fields, sections = all_fields(), all_sections()
    if section not in sections and section not in fields and section.partition(".")[0] in sections:
        outer = field_of(section)
        names = list(item_fields(outer.key))
        near = difflib.get_close_matches(name, names, 1)
        cure = f"did you mean {near[0]}?" if near else "leave it out; docs/config.md lists all keys"
        return "is not a key of the configuration", f"keys of {section}: {', '.join(names)}", cure
    if section in sections:
        allowed = f"keys of {section}: " + ", ".join(
            k.rpartition(".")[2] for k in fields if k.startswith(f"{section}.")
        )
    else:
        allowed = "sections and keys: " + ", ".join([*(k for k in fields if "." not in k), *sections])
    return "is not a key of the configuration", allowed, _cure_of_unknown(key, name, section, value)


def _cure_of_unknown(key: str, name: str, section: str, value: Any) -> str:
    fields = all_fields()
    if name in ("fp32", "bf16", "fp16") and section in ("", "precision"):
        return f"choose one: precision.dtype: {name}"
    if key in fields:  # written with a dot in a file
        outer, _, inner = key.rpartition(".")
        return f"write it in two lines: `{outer}:`, and below it, indented, `{inner}: {one_line(value)}`"
    near = nearest_keys(key, all_sections() if isinstance(value, dict) else fields)
    return f"did you mean {' or '.join(near)}?" if near else "leave it out; docs/config.md lists all keys"


def _wrong_value(key: str, detail: ErrorDetails) -> tuple[str, str, str]:
    """(message, allowed, cure) of a value that its field cannot have."""
    kind, value = detail["type"], detail["input"]
    if key in all_sections():
        keys = ", ".join(k.rpartition(".")[2] for k in all_fields() if k.startswith(f"{key}."))
        return "is a section and not a value", f"keys: {keys}", f"put `key: value` lines below `{key}:`"
    field = field_of(key)
    message = next((text for start, text in _MESSAGES.items() if kind.startswith(start)), "has the wrong type")
    return message, field.allowed, _cure_of_value(field, value)


def _cure_of_value(field: Field, value: Any) -> str:
    if field.allowed.startswith("one of "):
        return f"choose {field.allowed}"
    if field.kind == "string" and value is not None and not isinstance(value, str | dict | list):
        return f'put it in quotes: "{one_line(value)}" (on a command line: \'"{one_line(value)}"\')'
    if field.kind == "boolean":
        return "write true or false"
    if field.kind == "integer" and isinstance(value, float) and value.is_integer():
        return f"write it without point and exponent: {int(value)}"
    example = f", such as {one_line(field.default)}" if field.default not in (None, "", {}) else ""
    return f"set {field.key} to {field.allowed}{example}"
