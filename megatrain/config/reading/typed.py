"""From a tree of values to a typed config, and from pydantic's errors to problems with a cure."""

import difflib
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatrain.config.reading.fields import Field, all_fields, all_sections, field_of, item_fields, nearest_keys
from megatrain.config.reading.problems import Problem
from megatrain.config.reading.source import Node
from megatrain.config.reading.yaml_text import one_line
from megatrain.config.schema import RunConfig
from megatrain.spec.families import FAMILIES
from megatrain.spec.older import NEW_KEYS
from megatrain.spec.section import PATTERNS

# the beginning of pydantic's error type -> what is wrong
_MESSAGES = {
    "literal_error": "is not one of the choices",
    "greater_than": "is too small",
    "less_than": "is too large",
    "finite_number": "is not a finite number",
    "string_pattern": "has characters that are not allowed",
    "string_too_short": "is empty",
    "missing": "is not set",
    "value_error": "is no weight",
}
_MOST = 2**63 - 1  # what torch, NumPy and files hold
_WEIGHTS = "numbers of 0 or more, and fractions: 3, 0.3 or 3/7"
# what others call a choice, in small letters, where its letters do not tell
_MEANT: dict[str, Mapping[str, str]] = {
    "precision.dtype": {"float32": "fp32", "float": "fp32", "float16": "fp16", "half": "fp16", "bfloat16": "bf16"},
    "model.family": {other: name for name, family in FAMILIES.items() for other in family.also},
    "optimizer.name": {"adam": "adamw"},
}


def validate(tree: Node) -> tuple[RunConfig, list[Problem], set[str]]:
    """The typed config of ``tree``, its problems, and the dotted keys whose values mean nothing.

    With problems, the config has defaults in place of what is wrong. The key that a mistyped one was likely
    meant to be is unusable as well: its value is not what the user wanted.
    """
    values = _without_empty_sections(tree.plain())
    problems, unusable = [], set()
    for path, value in _huge_integers(values):
        unusable.add(".".join(path))
        cure = "write fewer digits"
        text, allowed = "is too large", f"whole numbers from {-_MOST - 1} to {_MOST} (2^63 - 1)"
        problems.append(Problem(".".join(path), value, text, allowed, cure, tree.origin_of(path)))
        _remove(values, path)
    try:
        return RunConfig.model_validate(values), problems, unusable
    except ValidationError as error:
        details = error.errors(include_url=False)
    for detail in details:
        path = [str(part) for part in detail["loc"] if part != "[key]"]
        key = ".".join(path)
        unusable.add(key)
        if detail["type"] == "extra_forbidden":
            problem = _unknown_key(key, detail["input"])
            unusable.update(nearest_keys(key, all_fields())[:1])
        elif detail["loc"][-1] == "[key]":
            problem = _wrong_name(detail)
        else:
            problem = _wrong_value(key, detail)
        problems.append(Problem(key, detail["input"], *problem, tree.origin_of(path)))
        _remove(values, path[:-1] if detail["type"] == "missing" else path)
    return RunConfig.model_validate(values), problems, unusable


def _without_empty_sections(values: dict[str, Any]) -> dict[str, Any]:
    """A section above nothing but comments reads as null, and means: nothing set."""
    may_be_empty = {*all_sections(), "deepspeed"}

    def below(section: dict[str, Any], prefix: str) -> dict[str, Any]:
        return {
            name: below(value, f"{prefix}{name}.")
            if isinstance(value, dict) and prefix + name in all_sections()
            else value
            for name, value in section.items()
            if value is not None or prefix + name not in may_be_empty
        }

    return below(values, "")


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
        allowed = f"keys of {section}: {_keys_of(section)}"
    else:
        allowed = "sections and keys: " + ", ".join([*(k for k in fields if "." not in k), *sections])
    return "is not a key of the configuration", allowed, _cure_of_unknown(key, name, section, value)


def _keys_of(section: str) -> str:
    """What may stand in a section, further sections last."""
    return ", ".join(
        key.rpartition(".")[2] for key in (*all_fields(), *all_sections()) if key.rpartition(".")[0] == section
    )


def _cure_of_unknown(key: str, name: str, section: str, value: Any) -> str:
    fields = all_fields()
    if name in ("fp32", "bf16", "fp16") and section in ("", "precision"):
        return f"choose one: precision.dtype: {name}"
    if section == "model" and name in NEW_KEYS:
        return f"write model.{NEW_KEYS[name]}, as it is called since version 0.2"
    if key in fields:  # written with a dot in a file
        outer, _, inner = key.rpartition(".")
        return f"write it in two lines: `{outer}:`, and below it, indented, `{inner}: {one_line(value)}`"
    near = nearest_keys(key, all_sections() if isinstance(value, dict) else fields)
    return f"did you mean {' or '.join(near)}?" if near else "leave it out; docs/config.md lists all keys"


def _wrong_value(key: str, detail: ErrorDetails) -> tuple[str, str, str]:
    """(message, allowed, cure) of a value that its field cannot have."""
    kind, value = detail["type"], detail["input"]
    if key in all_sections():
        return "is a section and not a value", f"keys: {_keys_of(key)}", f"put `key: value` lines below `{key}:`"
    field = field_of(key)
    message = next((text for start, text in _MESSAGES.items() if kind.startswith(start)), "has the wrong type")
    if kind == "value_error":
        reason = str(detail["ctx"]["error"])
        return f"{message}: it is {reason}", _WEIGHTS, f"set {key} to 0 (no samples) or more, such as 1"
    return message, field.allowed, _cure_of_value(key, field, value)


def _wrong_name(detail: ErrorDetails) -> tuple[str, str, str]:
    """(message, allowed, cure) of a key that is a name, such as that of a data set."""
    pattern = detail["ctx"]["pattern"]
    return "is a name with characters that are not allowed", PATTERNS[pattern], _cure_of_name(pattern, detail["input"])


def _cure_of_name(pattern: str, value: str) -> str:
    """The nearest name that is allowed: accents go, and what else is not allowed becomes a hyphen."""
    letters = unicodedata.normalize("NFKD", value).encode("ascii", "ignore").decode()
    allowed = "[^A-Za-z0-9._-]+" if "." in pattern else "[^A-Za-z0-9_-]+"
    near = re.sub(allowed, "-", letters).strip("-.")
    return f"write it as {near}" if re.fullmatch(pattern, near) else "write it in these characters, such as run-1"


def _huge_integers(values: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[list[str], int]]:
    """(path, value) of each whole number that 64 bits do not hold."""
    if isinstance(values, dict | list):
        for key, value in list(values.items() if isinstance(values, dict) else enumerate(values)):
            yield from _huge_integers(value, (*path, str(key)))
    elif isinstance(values, int) and not -_MOST - 1 <= values <= _MOST:
        yield list(path), values


def _cure_of_value(key: str, field: Field, value: Any) -> str:
    if field.choices:
        word, choices = str(value).lower(), [str(choice) for choice in field.choices]
        meant = _MEANT.get(key, {}).get(word) or next(iter(difflib.get_close_matches(word, choices, 1)), None)
        return (f"did you mean {meant}? " if meant else "") + f"choose {field.allowed}"
    if field.pattern and isinstance(value, str):
        return _cure_of_name(field.pattern, value)
    if field.kind == "string" and value is not None and not isinstance(value, str | dict | list):
        return f'put it in quotes: "{one_line(value)}" (on a command line: \'"{one_line(value)}"\')'
    if field.kind == "boolean":
        return "write true or false"
    if field.kind == "integer" and isinstance(value, float) and value.is_integer():
        return f"write it without point and exponent: {int(value)}"
    example = f", such as {one_line(field.default)}" if field.default not in (None, "", {}) else ""
    return f"set {key} to {field.allowed}{example}"
