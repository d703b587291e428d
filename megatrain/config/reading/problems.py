"""What is wrong with a configuration, said so that its writer can mend it without reading code."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatrain.config.reading.yaml_text import one_line
from megatrain.errors import ExpectedError

_MAX_VALUE_LENGTH = 80


@dataclass(frozen=True)
class Problem:
    """One thing to mend.

    key: dotted name of the field, as in a file or on the command line.
    value: what it is set to.
    message: what is wrong with that; goes on the sentence "key = value …".
    allowed: the values that would do, in words.
    cure: what to write instead, or where.
    origin: where the value comes from: 'path:line', 'command line', 'default' or 'derived'.
    """

    key: str
    value: Any
    message: str
    allowed: str
    cure: str
    origin: str = ""

    def __str__(self) -> str:
        value = one_line(self.value)
        if len(value) > _MAX_VALUE_LENGTH:
            value = value[: _MAX_VALUE_LENGTH - 1] + "…"
        origin = f"  [{self.origin}]" if self.origin else ""
        lines = [f"{self.key} = {value}{origin}", self.message, f"allowed: {self.allowed}", f"cure:    {self.cure}"]
        return "\n    ".join(lines)


class ConfigError(ExpectedError):
    """A configuration cannot be used; ``problems`` are all that were found, not only the first."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = list(problems)
        super().__init__(str(self))

    def __str__(self) -> str:
        count = len(self.problems)
        title = "The configuration has 1 problem:" if count == 1 else f"The configuration has {count} problems:"
        return "\n\n".join([title, *(f"  {problem}" for problem in self.problems)])
