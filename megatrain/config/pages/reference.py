"""What is generated and kept in the repository: the editors' JSON schema, the table of keys, that of compatibility.

Renew them after a change of the schema: `python -m megatrain.config.pages.reference`. Tests compare them.
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatrain.config.pages import compatibility_page
from megatrain.config.pages.table import between_marks, markdown_table
from megatrain.config.reading.fields import all_fields, all_sections
from megatrain.config.reading.yaml_text import one_line
from megatrain.config.rules.deepspeed_keys import ALLOWED, kind_of
from megatrain.config.schema import RunConfig

SCHEMA_FILE, PAGE = Path("configs/schema.json"), Path("docs/config.md")
_JSON_TYPES: dict[type, dict[str, Any]] = {
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    list: {"type": "array", "items": {"type": "string"}},
}


def json_schema() -> dict[str, Any]:
    """The JSON schema of a config file, by which editors complete, explain and check it."""
    schema = RunConfig.model_json_schema()
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "megatrain configuration"}
    schema["properties"]["deepspeed"] |= _closed_object()
    for dotted, (kind, description) in ALLOWED.items():
        section = schema["properties"]["deepspeed"]
        *outer, name = dotted.split(".")
        for part in outer:
            section = section["properties"].setdefault(part, _closed_object())
        section["properties"][name] = {**copy.deepcopy(_JSON_TYPES[kind]), "description": description}
    return schema


def schema_text() -> str:
    """Content of `configs/schema.json`."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def field_table() -> str:
    """All keys as Markdown, a table for each section."""
    fields = all_fields()
    groups = {"": "The whole run.", **all_sections()}
    parts = []
    for section, about in groups.items():
        own = [field for key, field in fields.items() if key.rpartition(".")[0] == section]
        rows = [(field.key, field.allowed, f"`{one_line(field.default)}`", field.description) for field in own]
        title = f"### `{section}`" if section else "### Without a section"
        parts.append(f"{title}\n\n{about}\n\n{_table(('key', 'values', 'default', 'meaning'), rows)}")
    extra = [(f"deepspeed.{key}", kind_of(key), text) for key, (_, text) in ALLOWED.items()]
    about = (
        "Extra DeepSpeed keys. All others are refused: derived ones with the name of the field to set instead, and "
        "those that would change numbers, break checkpoints or do nothing with the reason."
    )
    parts.append(f"### `deepspeed`\n\n{about}\n\n{_table(('key', 'values', 'meaning'), extra)}")
    return "\n".join(parts)


def with_table(page: str) -> str:
    """``page`` with the table renewed between its two marks."""
    return between_marks(page, field_table())


def _closed_object() -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": {}}


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    return markdown_table(header, [(f"`{row[0]}`", *row[1:]) for row in rows])


def main() -> None:
    """Writes all of them, from the repository's root."""
    SCHEMA_FILE.write_text(schema_text(), encoding="utf-8")
    for page, renewed in ((PAGE, with_table), (compatibility_page.PAGE, compatibility_page.with_tables)):
        page.write_text(renewed(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
