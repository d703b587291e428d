"""The schema as a flat table: what each dotted key may be, in words."""

import difflib
import functools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from megatrain.config.schema import RunConfig
from megatrain.spec.section import PATTERNS, Section

Settings = TypeVar("Settings", bound=Section)

_KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "string": "text",
    "array": "a list",
}
_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
}


@dataclass(frozen=True)
class Field:
    """A key that a user may set. ``allowed``: its values in words; ``kind``: the JSON schema's type; ``choices``: all
    values, where they are a few; ``pattern``: of text that has one."""

    key: str
    kind: str
    allowed: str
    default: Any
    description: str
    choices: tuple[Any, ...] = ()
    pattern: str = ""


@functools.cache
def all_fields() -> dict[str, Field]:
    """Every field by its dotted key, in the schema's order."""
    return {key: _field(key, entry) for key, entry in _entries() if "$ref" not in entry}


def _entries() -> Iterator[tuple[str, dict[str, Any]]]:
    """The schema's entry of each field and, before its fields, of each section, by dotted key."""
    schema = RunConfig.model_json_schema()

    def below(properties: dict[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, entry in properties.items():
            yield prefix + name, entry
            if "$ref" in entry:
                yield from below(_definition(schema, entry["$ref"])["properties"], f"{prefix}{name}.")

    return below(schema["properties"], "")


def _definition(schema: dict[str, Any], reference: str) -> dict[str, Any]:
    found: dict[str, Any] = schema["$defs"][reference.rsplit("/", 1)[1]]
    return found


@functools.cache
def item_fields(key: str) -> dict[str, Field]:
    """Keys of one item, by name, of a field whose value is a list or a mapping of such items; else none."""
    kind = re.search(r"#/\$defs/\w+", json.dumps(dict(_entries())[key]))
    inner = _definition(RunConfig.model_json_schema(), kind[0])["properties"] if kind else {}
    return {name: _field(f"{key}.{name}", inner_entry) for name, inner_entry in inner.items()}


def field_of(key: str) -> Field:
    """The field that a key belongs to: itself, or the one whose list or mapping it goes into."""
    outer = key
    while outer not in all_fields():
        outer = outer.rpartition(".")[0]
    name = key.rpartition(".")[2]
    return item_fields(outer).get(name, all_fields()[outer]) if outer != key else all_fields()[key]


@functools.cache
def all_sections() -> dict[str, str]:
    """Dotted names of the sections, with what each is about."""
    schema = RunConfig.model_json_schema()
    return {name: _definition(schema, entry["$ref"])["description"] for name, entry in _entries() if "$ref" in entry}


def value_at(config: RunConfig, key: str) -> object:
    """The value at a dotted key; None for a key below ``deepspeed`` that is not set."""
    if key.startswith("deepspeed."):
        return functools.reduce(_below, key.split(".")[1:], config.deepspeed)
    return functools.reduce(getattr, key.split("."), config)


def with_value(config: Settings, key: str, value: object) -> Settings:
    """``config`` with another value at a dotted key of its schema."""
    name, _, inner = key.partition(".")
    return config.model_copy(update={name: with_value(getattr(config, name), inner, value) if inner else value})


def _below(section: Any, key: str) -> Any:
    return section.get(key) if isinstance(section, dict) else None


def nearest_keys(key: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Known dotted keys that a mistyped ``key`` may mean, the likeliest first.

    A key in the wrong section counts by its last name, so `train.lr` finds `optimizer.lr`.
    """
    section, _, name = key.rpartition(".")

    def likeness(candidate: str) -> float:
        its_section, _, its_name = candidate.rpartition(".")
        same_name = difflib.SequenceMatcher(None, name.replace("-", "_"), its_name).ratio()
        same_section = difflib.SequenceMatcher(None, section, its_section).ratio()
        return same_name + 0.1 * same_section

    ranked = sorted(known, key=likeness, reverse=True)
    best = [candidate for candidate in ranked if likeness(candidate) >= 0.7]
    best = [candidate for candidate in best if candidate.rpartition(".")[0] == section] or best
    return [candidate for candidate in best if likeness(candidate) >= likeness(best[0]) - 0.15][:count]


def _field(key: str, entry: dict[str, Any]) -> Field:
    kinds = entry.get("anyOf", [entry])
    words = [_allowed(kind) for kind in kinds if kind.get("type") != "null"]
    if len(words) < len(kinds):
        words.append("null")
    main = next(kind for kind in kinds if kind.get("type") != "null")
    default = entry.get("default", [] if main["type"] == "array" else {})
    choices, pattern = tuple(main.get("enum", ())), main.get("pattern", "")
    return Field(key, main["type"], ", or ".join(words), default, entry["description"], choices, pattern)


def _allowed(entry: dict[str, Any]) -> str:
    if "enum" in entry:
        return "one of " + ", ".join(str(choice) for choice in entry["enum"])
    if "$ref" in entry:
        return "a section of keys"
    if entry["type"] == "object":
        return "a section of keys" if entry.get("additionalProperties") is True else "names, each with its value"
    if "pattern" in entry:
        return PATTERNS[entry["pattern"]]
    bounds = [words.format(_short(entry[name])) for name, words in _BOUNDS.items() if name in entry]
    return ", ".join([_KINDS[entry["type"]], " and ".join(bounds)] if bounds else [_KINDS[entry["type"]]])


def _short(bound: Any) -> str:
    return f"{bound:g}" if isinstance(bound, float) else str(bound)
