"""The names under which models that DeepSpeed trained keep their parameters, and how tensor ranks split them."""

import re
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from megatrain.convert.errors import ConversionError
from megatrain.convert.forms import GPT2_THIRDS, STACKED_GATE_UP
from megatrain.convert.huggingface.config import config_from_model, family_of_model
from megatrain.convert.table import Line, identity, their_shapes
from megatrain.spec.derive import num_tokens
from megatrain.spec.schema import ModelSpec

_SEVERAL_MATRICES = (GPT2_THIRDS, STACKED_GATE_UP)


def names_of(model: ModelSpec, names: Collection[str]) -> tuple[Line, ...]:
    """The name table of a model that DeepSpeed trained: the modules here, or Hugging Face's.

    Transformers 5 stacks experts in its modules; transformers 4 named them as files do.
    """
    if "embedding.word.weight" in names:
        return identity(model)
    family = family_of_model(model)
    stacked = any(name.endswith(".experts.gate_up_proj") for name in names)
    return family.modules if stacked and family.modules else family.lines


def module_order(model: ModelSpec) -> list[str]:
    """The parameters in the order of Hugging Face's modules, which DeepSpeed flattens them in."""
    import transformers

    values, auto = config_from_model(model), getattr(transformers, family_of_model(model).auto)
    with torch.device("meta"):
        whole = auto.from_config(transformers.AutoConfig.for_model(**values))
    return [name for name, _ in whole.named_parameters()]


class AutoTPSplit:
    """How tensor ranks share the modules of a family like Llama, the way that DeepSpeed's AutoTP cuts them.

    Raises:
        ConversionError: the model cannot be shared so.
    """

    def __init__(self, model: ModelSpec, names: Collection[str], num_ranks: int):
        self.num_ranks, self._names, self._num_tokens = num_ranks, names, num_tokens(model)
        if num_ranks == 1:
            return
        if model.feed_forward.activation != "swiglu" or model.experts.num_experts:
            raise ConversionError(
                "only dense models with separate queries, keys and values are written for tensor ranks"
            )
        sizes = {
            "attention.num_kv_heads": model.attention.num_kv_heads,
            "feed_forward.hidden_size": model.feed_forward.hidden_size,
        }
        for field, size in {**sizes, "vocabulary": self._num_tokens}.items():
            if size % num_ranks:
                raise ConversionError(f"{field} = {size} cannot be shared by {num_ranks} tensor ranks")

    def shape(self, name: str, whole: torch.Size) -> torch.Size:
        """The shape of one rank's part."""
        dim = self._dim(name)
        return (
            whole if dim is None else torch.Size(n // (self.num_ranks if d == dim else 1) for d, n in enumerate(whole))
        )

    def parts(self, name: str, tensor: Tensor) -> tuple[Tensor, ...]:
        """The parts that the ranks hold, in their order."""
        dim = self._dim(name)
        return (tensor,) * self.num_ranks if dim is None else tensor.chunk(self.num_ranks, dim)

    def universal_info(self) -> dict[str, Any]:
        """What ds_to_universal has to know."""
        exact = {name: f"^{re.escape(name)}$" for name in self._names}
        return {
            "universal_checkpoint_version": 0.2,
            "original_vocab_size": self._num_tokens,
            "parameter_with_row_parallelism_patterns": [exact[n] for n in exact if self._dim(n) == 1],
            "tp_replicated_parameter_patterns": [exact[n] for n in exact if self._dim(n) is None],
        }

    def _dim(self, name: str) -> int | None:
        """The dim that is split, of matrices of rows x columns."""
        if self.num_ranks == 1:
            return None
        if re.search(r"\.(q|k|v|gate|up)_proj\.(weight|bias)$", name) or name == "lm_head.weight":
            return 0
        return 1 if re.search(r"\.(o|down)_proj\.weight$", name) else None


class TensorRanks:
    """Puts the parts of tensor ranks together: which dim they split is what their shapes say."""

    def __init__(self, table: tuple[Line, ...], model: ModelSpec):
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
