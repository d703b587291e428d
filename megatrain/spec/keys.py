"""Dotted keys and nested sections, both ways."""

from collections.abc import Mapping
from typing import Any


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """``{"attention.num_heads": 8}`` as ``{"attention": {"num_heads": 8}}``; a later key wins over an earlier one."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        *outer, name = key.split(".")
        section = found
        for part in outer:
            section = section.setdefault(part, {})
        section[name] = value
    return found


def flat(sections: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"attention": {"num_heads": 8}}`` as ``{"attention.num_heads": 8}``."""
    found: dict[str, Any] = {}
    for name, value in sections.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found
