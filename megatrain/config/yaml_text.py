"""YAML text in and out, with YAML 1.2's plain scalars.

PyYAML follows YAML 1.1, to which ``3e-4`` is text, ``no`` a truth value, ``1:30`` ninety and ``2024-11-24`` a
date: surprises in a config file, where these are a learning rate, a word and names.
"""

import math
import re
from typing import Any

import yaml

_FLOAT = re.compile(
    r"^(?:[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)
# tag, pattern, characters that a match can begin with; the first match counts, so integers stand before floats
_PLAIN_SCALARS = [
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", re.compile(r"^<<$"), ["<"]),
]


_AS_WRITTEN: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "width": math.inf}


class Loader(yaml.SafeLoader):
    """Safe loader of YAML 1.2's core types."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - filled below, and PyYAML wants it on the class


class _Dumper(yaml.SafeDumper):
    """Quotes text that a reader of YAML 1.1 or of 1.2 would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _first in _PLAIN_SCALARS:
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    """Line breaks and control characters only survive in double quotes."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, None if value.isprintable() else '"')


_Dumper.add_representer(str, _text)


def one_line(value: Any) -> str:
    """``value`` as YAML on one line, whatever characters text holds."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, **_AS_WRITTEN)
    return text.removesuffix("\n").removesuffix("\n...")


def many_lines(value: Any) -> str:
    """``value`` as indented YAML, keys in their own order."""
    return yaml.dump(value, Dumper=_Dumper, **_AS_WRITTEN)
