"""The schema as a flat table: what each dotted key may be, in words."""

import difflib
import functools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from megatrain.config.schema import RunConfig
from megatrain.spec.section import PATTERNS

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
    schema = RunConfig.model_json_schema()
    found = {}
    for name, entry in schema["properties"].items():
        if "$ref" in entry:
            section = schema["$defs"][entry["$ref"].rsplit("/", 1)[1]]
            found.update(
                {f"{name}.{key}": _field(f"{name}.{key}", inner) for key, inner in section["properties"].items()}
            )
        else:
            found[name] = _field(name, entry)
    return found


@functools.cache
def item_fields(key: str) -> dict[str, Field]:
    """Keys of one item, by name, of a field whose value is a list or a mapping of such items; else none."""
    schema = RunConfig.model_json_schema()
    section, _, name = key.partition(".")
    entry = schema["$defs"][schema["properties"][section]["$ref"].rsplit("/", 1)[1]]["properties"][name]
    kind = re.search(r"#/\$defs/(\w+)", json.dumps(entry))
    inner = schema["$defs"][kind[1]]["properties"] if kind else {}
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
    """Names of the sections, with what each is about."""
    schema = RunConfig.model_json_schema()
    return {
        name: schema["$defs"][entry["$ref"].rsplit("/", 1)[1]]["description"]
        for name, entry in schema["properties"].items()
        if "$ref" in entry
    }


def value_at(config: RunConfig, key: str) -> object:
    """The value at a dotted key; None for a key below ``deepspeed`` that is not set."""
    if key.startswith("deepspeed."):
        return functools.reduce(_below, key.split(".")[1:], config.deepspeed)
    return functools.reduce(getattr, key.split("."), config)


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
