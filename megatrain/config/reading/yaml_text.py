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


_MAX_VALUES = 100_000
_MAX_NESTED = 100  # brackets
_AS_WRITTEN: dict[str, Any] = {"sort_keys": False, "allow_unicode": True, "width": math.inf}


class StrictYamlLoader(yaml.SafeLoader):
    """Safe loader of YAML 1.2's core types, for text of a bounded size written out: aliases of aliases have no end."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - filled below, and PyYAML wants it on the class

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        """Begins ``[`` or ``{``; a file of nothing else would take minutes."""
        if self.flow_level >= _MAX_NESTED:
            raise yaml.MarkedYAMLError(problem="values are nested too deeply", problem_mark=self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def get_single_node(self) -> yaml.Node | None:
        """The document's tree.

        Raises:
            yaml.MarkedYAMLError: no YAML; nested too deeply; over 100,000 values once each alias is written out.
        """
        try:
            root: yaml.Node | None = super().get_single_node()
            if root is not None and _written_out(root, {}) > _MAX_VALUES:
                problem = f"aliases stand for more than {_MAX_VALUES} values"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=root.start_mark)
        except RecursionError:
            raise yaml.MarkedYAMLError(problem="values are nested too deeply") from None
        return root


class _Dumper(yaml.SafeDumper):
    """Quotes text that a reader of YAML 1.1 or of 1.2 would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _written_out(node: yaml.Node, known: dict[int, int]) -> int:
    """Number of values below and with ``node``, each alias counted as what it stands for; one to itself as nothing."""
    if id(node) not in known:
        known[id(node)] = 0
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = isinstance(node, yaml.MappingNode)
        parts = [part for child in children for part in (child if pairs else (child,))]
        known[id(node)] = 1 + sum(_written_out(part, known) for part in parts)
    return known[id(node)]


for _tag, _pattern, _first in _PLAIN_SCALARS:
    StrictYamlLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
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
