"""The names under which models that DeepSpeed trained keep their parameters, and how tensor ranks split them."""

from collections.abc import Collection

import torch
from torch import Tensor

from megatrain.checkpoint.convert.errors import ConversionError
from megatrain.checkpoint.convert.forms import GPT2_THIRDS, STACKED_GATE_UP
from megatrain.checkpoint.convert.hf_config import config_from_model, family_of_model
from megatrain.checkpoint.convert.table import Line, identity, their_shapes
from megatrain.config.schema import ModelConfig

_SEVERAL_MATRICES = (GPT2_THIRDS, STACKED_GATE_UP)


def names_of(model: ModelConfig, names: Collection[str]) -> tuple[Line, ...]:
    """The name table of a model that DeepSpeed trained: the modules here, or Hugging Face's.

    Transformers 5 stacks experts in its modules; transformers 4 named them as files do.
    """
    if "embedding.word.weight" in names:
        return identity(model)
    family = family_of_model(model)
    stacked = any(name.endswith(".experts.gate_up_proj") for name in names)
    return family.modules if stacked and family.modules else family.lines


def module_order(model: ModelConfig) -> list[str]:
    """The parameters in the order of Hugging Face's modules, which DeepSpeed flattens them in."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = config_from_model(model)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    return [name for name, _ in whole.named_parameters()]


class TensorRanks:
    """Puts the parts of tensor ranks together: which dim they split is what their shapes say."""

    def __init__(self, table: tuple[Line, ...], model: ModelConfig):
        self._whole: dict[str, torch.Size] = {}
        self._several: set[str] = set()
        for entry, shapes in their_shapes(table, model):
            self._whole |= dict(zip(entry.theirs, shapes, strict=True))
            if entry.form in _SEVERAL_MATRICES:
                self._several.update(entry.theirs)

    def join(self, name: str, parts: list[Tensor]) -> Tensor:
        """The whole of a tensor's parts, of which there is one for each rank that holds any of it.

        Raises:
            ConversionError: they don't make a whole, or nobody can tell how.
        """
        first, whole = parts[0], self._whole.get(name)
        if len(parts) == 1 or first.shape == whole:
            if any(not torch.equal(first, part) for part in parts[1:]):
                raise ConversionError(f"{name} differs between tensor ranks that should hold the same")
            return first
        if name in self._several:
            raise ConversionError(f"{name} holds several matrices, and ranks may split it by rows or each of these")
        dims = [d for d in range(first.dim()) if whole and sum(part.shape[d] for part in parts) == whole[d]]
        if len(dims) != 1 or torch.cat(parts, dims[0]).shape != whole:
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            raise ConversionError(f"{name}: parts of shape {shapes} do not make {tuple(whole or ())}")
        return torch.cat(parts, dims[0])
