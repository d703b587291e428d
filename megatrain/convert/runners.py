"""The two models of a proof, run the same way and a block at a time: tokens in, activations and logits out.

Shapes: B sequences, S tokens, D width, V vocabulary.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from megatrain.convert.table import Weights
from megatrain.models.decoder import Decoder
from megatrain.models.parts.mixture import load_router_biases
from megatrain.parallel.layers import Layers
from megatrain.spec.derive import mixture_layers, num_tokens
from megatrain.spec.kinds import WEIGHT
from megatrain.spec.names import bias_name

_ROWS = 256  # tokens whose logits are in memory at a time


class Runner(Protocol):
    """A model in FP32, of which one block is in memory at a time."""

    def activations(self, batches: list[Tensor]) -> Iterator[list[Tensor]]:
        """[B, S, D] of each batch of tokens [B, S], before the first block and after each."""
        ...

    def logits(self) -> Iterator[Tensor]:
        """[rows, V] of all tokens, some at a time and in the same order for every runner, once the blocks have run."""
        ...


class OwnRunner:
    """The model here, with weights rounded to ``rounding`` as the other side stores them."""

    def __init__(self, weights: Weights, rounding: torch.dtype):
        self._weights, self._rounding, self._model = weights, rounding, weights.model
        self._hidden: list[Tensor] = []

    @torch.no_grad()
    def activations(self, batches: list[Tensor]) -> Iterator[list[Tensor]]:
        """See ``Runner``."""
        none = range(0)
        self._hidden = self._through(self._part(none, first=True), batches)
        yield self._batch_first()
        for number in range(self._model.num_layers):
            self._hidden = self._through(self._part(range(number, number + 1)), self._hidden)
            yield self._batch_first()

    @torch.no_grad()
    def logits(self) -> Iterator[Tensor]:
        """See ``Runner``."""
        head, tokens = self._part(range(0), last=True), num_tokens(self._model)
        for hidden_BSD in self._batch_first():
            for rows in hidden_BSD.flatten(0, 1).split(_ROWS):
                yield head(rows[:, None])[:, 0, :tokens]

    def _part(self, blocks: range, first: bool = False, last: bool = False) -> Decoder:
        """The given blocks as a pipeline stage has them."""
        part = Decoder(self._model, Layers(), blocks, first, last).eval()
        for name, parameter in part.named_parameters():
            parameter.copy_(self._weights.read(WEIGHT, name).to(self._rounding))
        biases = [bias_name(i) for i in blocks if self._model.router.balance_rate and i in mixture_layers(self._model)]
        load_router_biases(part, {name: self._weights.read(WEIGHT, name).tolist() for name in biases})
        return part

    @staticmethod
    def _through(part: Decoder, values: list[Tensor]) -> list[Tensor]:
        return [part(value) for value in values]

    def _batch_first(self) -> list[Tensor]:
        return [hidden_SBD.transpose(0, 1) for hidden_SBD in self._hidden]
