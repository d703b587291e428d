"""What a rule between fields is: a function that yields a problem for what it forbids, with the keys that it reads."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from types import ModuleType

from megatrain.config.reading.problems import Problem
from megatrain.config.schema import RunConfig

RuleFunction = Callable[[RunConfig, int | None], Iterable[Problem]]

LAYOUT = ("parallel.tp", "parallel.cp", "parallel.pp", "parallel.dp")
"""Keys that say how many ranks there are."""


@dataclass(frozen=True)
class Rule:
    """A rule. Called with a config and the number of ranks, where that is known, it yields problems.

    ``reads``: the dotted keys of all that it looks at; ``of_each_shape``: it also holds for every batch size and
    sequence length of a ramp.
    """

    function: RuleFunction
    reads: tuple[str, ...]
    of_each_shape: bool = False

    def __call__(self, config: RunConfig, world_size: int | None = None) -> Iterable[Problem]:
        return self.function(config, world_size)

    def is_sound_without(self, unusable: Collection[str]) -> bool:
        """Whether it reads none of these keys (of fields or sections)."""
        return not any(key == bad or key.startswith(f"{bad}.") for key in self.reads for bad in unusable)


def rule(*reads: str, of_each_shape: bool = False) -> Callable[[RuleFunction], Rule]:
    """Makes a function a rule; ``reads``: the keys that it reads, so that it is left out where one means nothing."""
    return lambda function: Rule(function, reads, of_each_shape)


def rules_of(module: ModuleType) -> list[Rule]:
    """The rules that stand in a module, in their order."""
    return [value for value in vars(module).values() if isinstance(value, Rule)]
