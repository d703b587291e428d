"""The side of a proof that is not ours: the model that transformers itself loads from a folder.

Shapes: B sequences, S tokens, D width, V vocabulary.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatrain.convert.errors import ProofFailed
from megatrain.convert.families.family import Family

_ROWS = 256  # tokens whose logits are in memory at a time
_MESSAGE = 500  # characters of another program's message


class HuggingFaceRunner:
    """What transformers' ``from_pretrained`` makes of a folder, run in FP32 a block at a time.

    The model stays in ``dtype``, the type of the files, whose pages are read when they are looked at; the block that
    runs is a copy in FP32.

    Raises:
        ProofFailed: transformers can't load the folder, or finds other tensors in it than it wants.
    """

    def __init__(self, folder: Path, family: Family, dtype: torch.dtype):
        self._model = _loaded(folder, family, dtype)
        self._base = self._model.base_model
        parent, _, self._list = family.blocks.rpartition(".")
        self._parent, self._output = self._model.get_submodule(parent), family.output
        self._blocks = list(self._model.get_submodule(family.blocks))
        self._word = self._model.get_input_embeddings()
        for child in self._base.children():
            if child not in (self._word, self._parent, getattr(self._parent, self._list)):
                child.float()
        self._rotary = getattr(self._base, "rotary_emb", None)
        self._base.config.num_hidden_layers = 1
        self._hidden: list[Tensor] = []

    @torch.no_grad()
    def activations(self, batches: list[Tensor]) -> Iterator[list[Tensor]]:
        """See ``Runner``."""
        self._hidden = [self._word(tokens).float() for tokens in batches]
        normed: list[Tensor] = []
        for number, block in enumerate(self._blocks):
            setattr(self._parent, self._list, nn.ModuleList([copy.deepcopy(block).float()]).eval())
            ran = [self._run(hidden) for hidden in self._hidden]
            if number == 0:
                yield [before for before, _, _ in ran]
                if (positions := getattr(self._base, "wpe", None)) is not None:
                    positions.weight.zero_()  # transformers adds them to whatever comes in
                if hasattr(self._base, "embeddings"):  # as BERT's module does all that it adds and normalises
                    self._base.embeddings = _AsTheyAre()
            self._hidden, normed = [after for _, after, _ in ran], [norm for _, _, norm in ran]
            yield self._hidden
        self._hidden = normed

    @torch.no_grad()
    def logits(self) -> Iterator[Tensor]:
        """See ``Runner``."""
        output = self._model.get_submodule(self._output) if self._output else self._model.get_output_embeddings()
        head = copy.deepcopy(output).float()
        for hidden_BSD in self._hidden:
            for rows in hidden_BSD.flatten(0, 1).split(_ROWS):
                yield head(rows)

    def _run(self, hidden_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S, D] before the only block of ``base``, after it, and after the last norm.

        Stretched rotary frequencies remember the longest sequence so far, and each run gets fresh ones.
        """
        found: list[Tensor] = []

        def keep(value: Any) -> None:
            found.append(value[0] if isinstance(value, tuple) else value)

        (block,) = getattr(self._parent, self._list)
        if self._rotary is not None:
            self._base.rotary_emb = copy.deepcopy(self._rotary)
        hooks = [
            block.register_forward_pre_hook(
                lambda module, inputs, named: keep(inputs or named["hidden_states"]), with_kwargs=True
            ),
            block.register_forward_hook(lambda module, inputs, output: keep(output)),
        ]
        try:
            normed = self._base(inputs_embeds=hidden_BSD, use_cache=False)[0]
        finally:
            for hook in hooks:
                hook.remove()
        return found[0], found[1], normed


class _AsTheyAre(nn.Module):
    """Embeddings that leave alone what comes in instead of tokens."""

    def forward(self, inputs_embeds: Tensor, **others: Any) -> Tensor:
        return inputs_embeds


def _loaded(folder: Path, family: Family, dtype: torch.dtype) -> Any:
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    made: Any
    try:
        own = {"local_files_only": True, "trust_remote_code": False}
        config = transformers.AutoConfig.from_pretrained(folder, **own)
        config._attn_implementation = "sdpa"  # whatever kernel it names, which may want a GPU
        made = getattr(transformers, family.auto).from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True, **own
        )
    except Exception as error:  # whatever its code and those of its libraries raise
        reason = f"{type(error).__name__}: {str(error)[:_MESSAGE]}"
        raise ProofFailed(f"transformers does not load {folder}: {reason}") from error
    model, told = made
    problems = {kind: sorted(map(str, told.get(kind) or ())) for kind in ("missing_keys", "mismatched_keys")}
    if listed := [f"{kind}: {', '.join(names[:3])}" for kind, names in problems.items() if names]:
        raise ProofFailed(f"transformers loads {folder} with parts of its own making: {'; '.join(listed)}")
    return model.eval()
