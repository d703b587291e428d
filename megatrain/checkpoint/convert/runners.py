"""The two models of a proof, run the same way: tokens in, logits and the activations after each block out.

Shapes: B sequences, S tokens, D width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatrain.checkpoint.convert.families.family import Family
from megatrain.checkpoint.convert.table import WEIGHT, Weights
from megatrain.config.derive import num_tokens
from megatrain.models.build import build_empty_model


class Runner:
    """A model in FP32 with its list of blocks.

    Args:
        logits: [B, S] tokens -> [B, S, V] logits.
        batch_dim: of the activations that the blocks give.
    """

    def __init__(self, model: nn.Module, blocks: list[nn.Module], logits: Callable[[Tensor], Tensor], batch_dim: int):
        self.model, self.blocks, self._logits, self._batch_dim = model.eval(), blocks, logits, batch_dim

    @torch.no_grad()
    def logits(self, tokens_BS: Tensor) -> Tensor:
        """[B, S, V], FP32."""
        return self._logits(tokens_BS).float()

    def activations(self, tokens_BS: Tensor) -> list[Tensor]:
        """[B, S, D] before the first block and after each."""
        found: list[Tensor] = []
        with self._watched(found):
            self.logits(tokens_BS)
        return found

    @contextmanager
    def _watched(self, found: list[Tensor]) -> Iterator[None]:
        def keep(value: Any) -> None:
            hidden = value[0] if isinstance(value, tuple) else value
            found.append(hidden.detach() if self._batch_dim == 0 else hidden.detach().transpose(0, 1))

        def before(module: nn.Module, inputs: Any, named: Any) -> None:
            keep(inputs or named["hidden_states"])

        hooks = [self.blocks[0].register_forward_pre_hook(before, with_kwargs=True)]
        hooks += [block.register_forward_hook(lambda module, inputs, output: keep(output)) for block in self.blocks]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def own_runner(weights: Weights, rounding: torch.dtype) -> Runner:
    """The model here, with weights rounded to ``rounding`` as the other side stores them."""
    model = build_empty_model(weights.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.read(WEIGHT, name).to(rounding))
    tokens = num_tokens(weights.model)
    return Runner(
        model,
        list(model.layers.values()),
        lambda tokens_BS: model(tokens_BS).transpose(0, 1)[..., :tokens],
        batch_dim=1,
    )


def hugging_face_runner(folder: Path, family: Family) -> Runner:
    """What transformers makes of a folder."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    blocks = list(model.get_submodule(family.blocks).children())
    return Runner(model, blocks, lambda tokens_BS: model(tokens_BS, use_cache=False).logits, batch_dim=0)
