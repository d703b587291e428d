"""The two models of a proof, run the same way and a block at a time: tokens in, activations and logits out.

Shapes: B sequences, S tokens, D width, V vocabulary.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatrain.checkpoint.convert.errors import ProofFailed
from megatrain.checkpoint.convert.families.family import Family
from megatrain.checkpoint.convert.table import Reader, Weights
from megatrain.config.derive import mixture_layers, num_tokens
from megatrain.engine.kinds import WEIGHT
from megatrain.engine.routing import bias_name
from megatrain.models.decoder import Decoder
from megatrain.models.mixture import load_router_biases
from megatrain.parallel.layers import Layers

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
        """As a pipeline stage."""
        part = Decoder(self._model, Layers(), blocks, first, last).eval()
        for name, parameter in part.named_parameters():
            parameter.copy_(self._weights.read(WEIGHT, name).to(self._rounding))
        biases = [bias_name(i) for i in blocks if self._model.router_balance_rate and i in mixture_layers(self._model)]
        load_router_biases(part, {name: self._weights.read(WEIGHT, name).tolist() for name in biases})
        return part

    @staticmethod
    def _through(part: Decoder, values: list[Tensor]) -> list[Tensor]:
        return [part(value) for value in values]

    def _batch_first(self) -> list[Tensor]:
        return [hidden_SBD.transpose(0, 1) for hidden_SBD in self._hidden]


class HuggingFaceRunner:
    """What transformers makes of a folder's config and weights, loaded into models of one block each.

    The other parts of these models are empty: of a vocabulary of one token, unless they are what is run.
    """

    def __init__(self, folder: Path, family: Family, reader: Reader):
        import transformers
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self._family, self._reader = family, reader
        self._class = getattr(transformers, family.architecture)
        self._config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            self._whole = self._class(self._config)
        self._last = len(self._blocks(self._whole)) - 1
        self._hidden: list[Tensor] = []

    @torch.no_grad()
    def activations(self, batches: list[Tensor]) -> Iterator[list[Tensor]]:
        """See ``Runner``."""
        self._hidden = batches
        for number in range(self._last + 1):
            model = self._one_block(number)
            ran = [self._run(model, value, first=number == 0) for value in self._hidden]
            if number == 0:
                yield [before for before, _, _ in ran]
            if number == self._last:
                self._head = model.get_output_embeddings()
                self._hidden = [normed for _, _, normed in ran]
            else:
                self._hidden = [after for _, after, _ in ran]
            del model
            yield [after for _, after, _ in ran]

    @torch.no_grad()
    def logits(self) -> Iterator[Tensor]:
        """See ``Runner``."""
        for hidden_BSD in self._hidden:
            for rows in hidden_BSD.flatten(0, 1).split(_ROWS):
                yield self._head(rows).float()

    def _run(self, model: Any, value: Tensor, first: bool) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, D] before the block, after it, and after the last norm."""
        found: list[Tensor] = []

        def keep(value: Any) -> None:
            found.append(value[0] if isinstance(value, tuple) else value)

        (block,) = self._blocks(model)
        hooks = [
            block.register_forward_pre_hook(
                lambda module, inputs, named: keep(inputs or named["hidden_states"]), with_kwargs=True
            ),
            block.register_forward_hook(lambda module, inputs, output: keep(output)),
        ]
        try:
            normed = model.base_model(**{"input_ids" if first else "inputs_embeds": value}, use_cache=False)[0]
        finally:
            for hook in hooks:
                hook.remove()
        return found[0], found[1], normed

    def _one_block(self, number: int) -> Any:
        """A model whose only block is that of a number. Its one matrix of the vocabulary's size is the word embedding
        in the first, the head in the last."""
        first, last, blocks = number == 0, number == self._last, self._family.blocks
        config = copy.deepcopy(self._config)
        config.num_hidden_layers, config.pad_token_id = 1, None
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[number]]
        if self._family.dense_blocks is not None:
            setattr(config, self._family.dense_blocks, [] if number in mixture_layers(self._reader.model) else [0])
            config.decoder_sparse_step = 1
        config.vocab_size = config.vocab_size if first or last else 1
        config.tie_word_embeddings = config.tie_word_embeddings or not (first and last)
        inside = [name for name in self._reader.names() if name.startswith(f"{blocks}.{number}.")]
        state = {f"{blocks}.0.{name.removeprefix(f'{blocks}.{number}.')}": self._read(name) for name in inside}
        state |= self._outside(first, last, config)
        model = self._class.from_pretrained(None, config=config, state_dict=state, dtype=torch.float32).eval()
        (block,), wanted = self._blocks(model), self._blocks(self._whole)[number]
        if _shapes(block) != _shapes(wanted):
            raise ProofFailed(f"layers.{number} is another kind of block for transformers than its config says here")
        return model

    def _outside(self, first: bool, last: bool, config: Any) -> dict[str, Tensor]:
        """The tensors that belong to no block."""
        names = {str(line.ours): str(line.theirs) for line in self._family.lines if "{}" not in line.ours}
        word, head = names.pop("embedding.word.weight"), names.pop("head.weight")
        position = names.pop("embedding.position.weight", None)
        state = {name: self._read(name) for name in names.values()}
        if position is not None:
            state[position] = self._read(position) * (1.0 if first else 0.0)  # added to whatever comes in
        if not config.tie_word_embeddings:
            state[head] = self._read(head)
        if first or last:
            state[word] = self._read(word if first or self._reader.model.tie_embeddings else head)
        else:
            state[word] = torch.zeros(1, config.hidden_size)
        return state

    def _read(self, name: str) -> Tensor:
        return self._reader.read(WEIGHT, name)

    def _blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(model.get_submodule(self._family.blocks).children())


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in module.named_parameters()}
