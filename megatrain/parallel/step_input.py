"""What the model reads in a step."""

from typing import Any, NamedTuple

from torch import Tensor


class StepInput(NamedTuple):
    """One rank's sequences of a step: [N, S] tokens and labels, [N] dropout keys.

    ``keys`` are the samples' numbers where the model drops nothing: nobody reads them.
    ``positions`` [N, T]: places in their documents of all tokens, also of those that other context ranks hold.
    ``lengths`` [N]: tokens of the whole sequences before their padding.
    """

    tokens: Tensor
    labels: Tensor
    keys: Tensor
    positions: Tensor | None = None
    lengths: Tensor | None = None

    def split(self, size: int) -> "list[StepInput]":
        """Micro-batches of ``size`` sequences."""
        columns: list[Any] = [[None] * len(self.tokens) if x is None else x.split(size) for x in self]
        return [StepInput(*parts) for parts in zip(*columns, strict=False)]  # None for each of fewer micro-batches
