"""Where values come from: YAML files and overrides, read into trees that know their origin."""

import errno
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatrain.config.reading.problems import ConfigError, Problem
from megatrain.config.reading.yaml_text import StrictYamlLoader

COMMAND_LINE = "command line"
_MAX_BYTES = 2**22
_ASSIGNMENT = re.compile(r"[a-z]\w*(\.\w+)*=")  # as other programs set a field
_MAX_DEPTH = 16  # of mappings; an alias to an enclosing mapping has no end


@dataclass(frozen=True)
class Node:
    """A value and where it stands. ``content`` is a dict of nodes where the value is a mapping, and a list of nodes
    where it is a list. ``is_path``: a mapping that only leads to the one key of a dotted name; ``is_empty``: nothing
    was written, not even null."""

    content: Any
    origin: str
    is_path: bool = False
    is_empty: bool = False

    def plain(self) -> Any:
        """The value without origins."""
        if isinstance(self.content, dict):
            return {key: node.plain() for key, node in self.content.items()}
        if isinstance(self.content, list):
            return [node.plain() for node in self.content]
        return self.content

    def parts(self) -> dict[str, "Node"]:
        """What stands inside, by key, or by number in a list; a plain value has nothing inside."""
        if isinstance(self.content, list):
            return {str(number): node for number, node in enumerate(self.content)}
        return self.content if isinstance(self.content, dict) else {}

    def leaves(self, prefix: str = "") -> Iterator[tuple[str, str]]:
        """(dotted key, origin) of every value below, of a list also its own."""
        for key, node in self.parts().items():
            if not node.parts() or isinstance(node.content, list):
                yield prefix + key, node.origin
            yield from node.leaves(f"{prefix}{key}.")

    def origin_of(self, path: Sequence[str]) -> str:
        """Where the value below these keys stands."""
        node = self
        for key in path:
            if key not in node.parts():
                break  # a key that should be there
            node = node.parts()[key]
        return node.origin


def node_of(value: Any, origin: str) -> Node:
    """A tree of a plain value, all of one origin."""
    if isinstance(value, dict):
        return Node({key: node_of(entry, origin) for key, entry in value.items()}, origin)
    return Node([node_of(entry, origin) for entry in value] if isinstance(value, list) else value, origin)


NAMED = ("data.train", "data.validation")
"""Fields whose keys are names: together they are one value."""


def merge(low: Node, high: Node, key: str = "") -> Node:
    """``high`` over ``low`` at ``key``: mappings key by key, anything else replaced.

    A mapping of names (``NAMED``) is replaced as a whole, unless a dotted key leads into it. An empty section (one
    above nothing but comments) changes nothing, where null replaces it.
    """
    if isinstance(low.content, dict) and high.is_empty and "." not in key:
        return low
    if not (isinstance(low.content, dict) and isinstance(high.content, dict)) or (key in NAMED and not high.is_path):
        return high
    merged = dict(low.content)
    for name, node in high.content.items():
        merged[name] = merge(merged[name], node, f"{key}.{name}".lstrip(".")) if name in merged else node
    return Node(merged, high.origin)


def read_file(path: Path) -> Node:
    """The tree of a YAML file.

    Raises:
        ConfigError: it cannot be read, is no YAML, or says a thing twice.
    """
    try:
        with open(path, "rb") as file:  # a pipe is fine: a shell gives one for the output of a command
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise OSError(errno.EFBIG, f"it holds more than {_MAX_BYTES} bytes")
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        cure = "give the path of a file that is there, from the folder you are in"
        if isinstance(error, FileNotFoundError) and _ASSIGNMENT.match(str(path)):
            cure = f"a field is set by `--{path}`, after the config files"
        raise ConfigError(
            [Problem("config file", str(path), f"cannot be read: {reason}", "a YAML file", cure)]
        ) from None
    return read_text(text, str(path))


def read_text(text: str, name: str) -> Node:
    """The tree of YAML ``text``, whose origins are ``name:line``. Raises ConfigError as ``read_file``."""
    tree = _parse(text, lambda line: f"{name}:{line}", key="config file", shown=name)
    if tree.content is None:
        return Node({}, tree.origin)
    if not isinstance(tree.content, dict):
        cure = "begin with a section, such as `model:`, and put `key: value` lines below it"
        problem = Problem("config file", name, "holds no keys", "`key: value` lines", cure, tree.origin)
        raise ConfigError([problem])
    return tree


def read_overrides(arguments: Sequence[str]) -> Node:
    """The tree of ``--a.b value`` and ``--a.b=value`` arguments; a value is YAML, the last of several counts.

    Raises:
        ConfigError: all arguments that cannot be understood.
    """
    tree, problems, waiting = Node({}, COMMAND_LINE), [], list(arguments)
    while waiting:
        argument = waiting.pop(0)
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not key:
            cure = "write `--section.key value`, such as `--model.num_layers 4`"
            if argument.endswith((".yaml", ".yml")):
                cure = f"config files follow --config: write `--config {argument}`"
            elif _ASSIGNMENT.match(argument):
                cure = f"write `--{argument}`"
            message = "is neither an override nor the value of one"
            problems.append(Problem("argument", argument, message, "--section.key value", cure, COMMAND_LINE))
            continue
        if not equals:
            if not waiting or waiting[0].startswith("--"):
                cure = f"write `--{key} VALUE`; a switch takes `true` or `false`"
                problems.append(Problem(key, None, "has no value", "a value after the key", cure, COMMAND_LINE))
                continue
            text = waiting.pop(0)
        try:
            node = _parse(text, lambda _: COMMAND_LINE, key=key, shown=text)
        except ConfigError as error:
            problems += error.problems
            continue
        for part in reversed(key.split(".")):
            node = Node({part: node}, COMMAND_LINE, is_path=True)
        tree = merge(tree, node)
    if problems:
        raise ConfigError(problems)
    return tree


def _parse(text: str, origin: Callable[[int], str], key: str, shown: str) -> Node:
    """The tree of YAML ``text``; ``key`` and ``shown`` name it in problems."""
    try:
        loader = StrictYamlLoader(text)
        root = loader.get_single_node()
        return (
            Node(None, origin(1), is_empty=True) if root is None else _tree(loader, root, origin, root.start_mark.line)
        )
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        what = " ".join(part for part in (error.context, error.problem) if part)
    except (yaml.YAMLError, ValueError) as error:  # a character that YAML does not allow, a number of 5000 digits
        line, what = 1, str(error).splitlines()[0]
    cure = "mend that line: mappings are `key: value`, indented by spaces, each key once"
    raise ConfigError([Problem(key, shown, f"is not valid YAML: {what}", "YAML", cure, origin(line))])


def _tree(loader: StrictYamlLoader, node: yaml.Node, origin: Callable[[int], str], line: int, depth: int = 0) -> Node:
    if isinstance(node, yaml.ScalarNode):
        empty = node.value == "" and node.style is None
        return Node(loader.construct_object(node, deep=True), origin(line + 1), is_empty=empty)
    if depth == _MAX_DEPTH:
        raise yaml.MarkedYAMLError(problem="mappings are nested too deeply", problem_mark=node.start_mark)
    if isinstance(node, yaml.SequenceNode):
        items = [_tree(loader, item, origin, item.start_mark.line, depth + 1) for item in node.value]
        return Node(items, origin(line + 1))
    assert isinstance(node, yaml.MappingNode)
    _refuse_twice(node)
    loader.flatten_mapping(node)  # puts what `<<` brings before the mapping's own keys
    content = {key.value: _tree(loader, value, origin, key.start_mark.line, depth + 1) for key, value in node.value}
    return Node(content, origin(line + 1))


def _refuse_twice(node: yaml.MappingNode) -> None:
    """Plain PyYAML lets the last of two equal keys win, in silence."""
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key must be plain text", problem_mark=key.start_mark)
        if key.value in lines:
            first = lines[key.value] + 1
            text = f"the key {key.value!r} stands here and in line {first}"
            raise yaml.MarkedYAMLError(problem=text, problem_mark=key.start_mark)
        lines[key.value] = key.start_mark.line
