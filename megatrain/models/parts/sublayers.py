"""What a block's two sublayers have in common, whatever they compute.

Shapes: S sequence, B micro-batch, D width.
"""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn

from megatrain.models.parts.documents import Documents
from megatrain.models.parts.rotary import Turns


class MicroBatch(NamedTuple):
    """What blocks are told of a micro-batch beside its activations.

    ``keys_B``: of the samples' dropout. ``documents``: of sequences that hold several. ``turns``: of rotary positions.
    ``lengths_B``: tokens of each whole sequence before its padding. Each is None where there is nothing to tell.
    """

    keys_B: Tensor | None = None
    documents: Documents | None = None
    turns: Turns | None = None
    lengths_B: Tensor | None = None


class Sublayer(nn.Module):
    """Activations [S, B, D] to activations [S, B, D], told of the micro-batch."""

    def forward(self, x_SBD: Tensor, batch: MicroBatch) -> Tensor:
        raise NotImplementedError

    def recomputed(self) -> Iterable[nn.Module]:
        """The modules within that keep much for their work, and are computed again where memory is short."""
        return ()

    def compile_parts(self) -> None:
        """Compiles what lies behind a part that no graph can hold; the rest is compiled with the block."""


class Mixer(Sublayer):
    """The sublayer in which positions learn of each other."""

    is_causal: bool


class FeedForward(Sublayer):
    """The sublayer that works on each position by itself."""
