"""Which checkpoints stay: the newest few, and every so many steps one for good."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from megatrain.checkpoint.store.folder import list_checkpoints, remove_checkpoint, step_of


@dataclass(frozen=True)
class Retention:
    """``keep_last``: how many of the newest stay; 0: all. ``keep_every``: steps divisible by it stay, too; 0: none."""

    keep_last: int = 0
    keep_every: int = 0

    def surplus(self, steps: Iterable[int]) -> list[int]:
        """The members of ``steps`` that go, lowest first; the highest never does."""
        ordered = sorted(steps)
        if self.keep_last == 0:
            return []
        return [s for s in ordered[: -self.keep_last] if not self.keep_every or s % self.keep_every]


def surplus_checkpoints(folder: Path, rule: Retention, damaged: Collection[int] = ()) -> list[Path]:
    """The checkpoints of ``folder`` that ``rule`` gives up. Damaged steps are no replacement: they aren't counted."""
    found = {step: path for path in list_checkpoints(folder) if (step := step_of(path.name)) is not None}
    return [found[step] for step in rule.surplus(found.keys() - set(damaged))]


def prune(folder: Path, rule: Retention, damaged: Collection[int] = ()) -> list[Path]:
    """Removes them; returns what was removed.

    Raises:
        CheckpointError: one can't be removed.
    """
    surplus = surplus_checkpoints(folder, rule, damaged)
    for path in surplus:
        remove_checkpoint(path)
    return surplus
