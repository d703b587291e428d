"""From files and overrides to a checked config whose every value knows where it comes from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatrain.config.clip import clipped
from megatrain.config.derive import num_ranks, resolve
from megatrain.config.reading.fields import all_fields, value_at
from megatrain.config.reading.problems import ConfigError, Problem
from megatrain.config.reading.source import Node, merge, node_of, read_file, read_overrides, read_text
from megatrain.config.reading.typed import validate
from megatrain.config.rules.check import check
from megatrain.config.schema import ResolvedRun, RunConfig
from megatrain.spec.older import of_this_version

DEFAULT, DERIVED = "default", "derived"


@dataclass(frozen=True)
class Loaded:
    """A checked config and the origin of every value, by dotted key.

    An origin is 'path:line', 'command line', 'default' or 'derived'. Extra DeepSpeed keys have their own.
    ``notes``: values that were changed to fit others, in sentences.
    """

    config: RunConfig
    origins: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def with_derived(self, world_size: int) -> "Resolved":
        """The same with the fields filled in that follow from others, for a run of ``world_size`` ranks.

        Raises:
            ConfigError: the config does not fit so many ranks.
        """
        problems = check(self.config, world_size)
        if problems:
            raise ConfigError(self.with_origins(problems))
        fitting, notes = clipped(self.config)
        config = resolve(fitting, world_size)
        filled = {key for key in all_fields() if value_at(self.config, key) != value_at(config, key)}
        return Resolved(config, {**self.origins, **dict.fromkeys(filled, DERIVED)}, tuple(notes))

    def with_origins(self, problems: Sequence[Problem]) -> list[Problem]:
        """``problems`` of this config, with the origins of their values."""
        return [replace(problem, origin=problem.origin or self._origin(problem)) for problem in problems]

    def _origin(self, problem: Problem) -> str:
        if problem.value is not None and problem.key in all_fields() and value_at(self.config, problem.key) is None:
            return DERIVED
        key, origin = problem.key, self.origins.get(problem.key)
        while origin is None and "." in key:  # a section of extra keys, an item of a list: any value in it
            origin = next((where for name, where in self.origins.items() if name.startswith(f"{key}.")), None)
            key = key.rpartition(".")[0]
        return origin or DEFAULT


@dataclass(frozen=True)
class Resolved(Loaded):
    """The same with nothing left open."""

    config: ResolvedRun


def load_config(files: Sequence[Path], overrides: Sequence[str] = (), world_size: int | None = None) -> Loaded:
    """The config that ``files``, merged left to right, and then ``overrides`` describe.

    What follows from others stays open until ``with_derived``.

    Args:
        overrides: `--model.num_layers 4` or `--model.num_layers=4`, as the command line splits them.
        world_size: ranks that were started, where that is known: rules that depend on it are then checked too.
    Raises:
        ConfigError: with everything that is wrong.
    """
    trees, problems = [Node({}, DEFAULT)], []
    for path in files:
        try:
            trees.append(read_file(path))
        except ConfigError as error:
            problems += error.problems
    try:
        trees.append(read_overrides(overrides))
    except ConfigError as error:
        problems += error.problems
    if problems:  # what a broken file would have set is unknown, so nothing else can be judged
        raise ConfigError(problems)
    tree = trees[0]
    for higher in trees[1:]:
        tree = merge(tree, higher)
    return _checked(tree, world_size)


def from_yaml(text: str, name: str = "config.yaml") -> ResolvedRun:
    """The config that ``show.to_yaml`` wrote; ``name`` says in problems where the text stood.

    Raises:
        ConfigError: with everything that is wrong.
    """
    config = _checked(_of_this_version(read_text(text, name)), None).config
    return resolve(config, world_size=num_ranks(config.parallel))


def _of_this_version(tree: Node) -> Node:
    """A run folder of an older version is read, too."""
    if "model" not in tree.content:
        return tree
    model = tree.content["model"]
    return Node({**tree.content, "model": node_of(of_this_version(model.plain()), model.origin)}, tree.origin)


def _checked(tree: Node, world_size: int | None) -> Loaded:
    config, problems, unusable = validate(tree)
    origins = dict.fromkeys(all_fields(), DEFAULT)
    for key, origin in tree.leaves():
        origins[key] = origin
        while "." in key:  # a field whose value is a mapping comes from where its entries do
            key = key.rpartition(".")[0]
            if key in all_fields():
                origins[key] = origin
    loaded = Loaded(config, origins)
    problems += loaded.with_origins(check(config, world_size, unusable))
    if problems:
        raise ConfigError(problems)
    return loaded
