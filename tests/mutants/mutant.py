"""A mutant: one plausible mistake in the package, as a replacement of a text that stands once in its file."""

import ast
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutant:
    """``file``: below ``megatrain``; ``old``: stands there once; ``kind``: of mistake, in a few words.

    ``see``: names of witnesses (witnesses.py), the likeliest first, that are to see it; ``public``: the class of public
    silent bugs (public.py) that it replays; ``survives``: why no test can see it, where none can.
    """

    file: str
    old: str
    new: str
    kind: str
    see: tuple[str, ...]
    public: str = ""
    survives: str = ""

    @property
    def room(self) -> str:
        """Part of the package: what stands first in the path of its file."""
        return self.file.partition("/")[0]

    @property
    def path(self) -> Path:
        return ROOT / "megatrain" / self.file

    @property
    def module(self) -> str:
        return f"megatrain.{self.file.removesuffix('.py').replace('/', '.')}"

    @property
    def name(self) -> str:
        """Short, and of its own: the file, the number of the line and what is done there."""
        line = self.path.read_text(encoding="utf-8").partition(self.old)[0].count("\n") + 1
        return f"{self.file}:{line} {' '.join(self.old.split())!r} -> {' '.join(self.new.split())!r}"

    def source(self) -> str:
        """The file's text with the mistake.

        Raises:
            ValueError: the text to replace does not stand there once, or what comes of it is no Python or the same.
        """
        text = self.path.read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"megatrain/{self.file} has {self.old!r} {count} times")
        mutated = text.replace(self.old, self.new)
        try:
            tree = ast.parse(mutated)
        except SyntaxError as error:
            raise ValueError(f"megatrain/{self.file} with {self.new!r}: {error}") from error
        if ast.dump(tree) == ast.dump(ast.parse(text)):
            raise ValueError(f"megatrain/{self.file}: {self.new!r} changes nothing")
        return mutated
