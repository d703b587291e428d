"""Megatron-core's distributed checkpoints: its GPT model in ``torch_dist``, with the optimizer's states."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain.convert.errors import ConversionError
from megatrain.convert.huggingface.tokenizer import read_json
from megatrain.convert.megatron.names import MEGATRON_CORE, extra_states
from megatrain.convert.megatron.states import CONTENT, MASTERS, common_states, state_key
from megatrain.convert.megatron.torch_dist import METADATA, TorchDistReader, TorchDistWriter
from megatrain.convert.model_file import read_model, write_model
from megatrain.convert.pickles import require_trust
from megatrain.convert.table import Line
from megatrain.spec.derive import mixture_layers
from megatrain.spec.kinds import MOMENTS, WEIGHT
from megatrain.spec.schema import ModelSpec

CONFIG, COMMON, LATEST = "metadata.json", "common.pt", "latest_checkpointed_iteration.txt"
_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_LAYER = re.compile(r"(decoder\.layers\.)(\d+)\.")
_STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.([a-z0-9_]+)\.(.+)")
# with singleton_local_shards each expert has keys of its own, and each half of a gated matrix
_EXPERTS, _HALVES = ".experts.experts.", ("_w", "_v")
_SINGLY = re.compile(r"(?<=\.experts\.experts\.)\d+\.|(?<=\.weight)_[wv]$")
_NORM_OF_LOCAL_SPEC, _NORM = "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"


def iteration_folder(path: Path) -> Path | None:
    """``path`` itself or the iteration in it that is the latest, if that is a checkpoint of this kind."""
    latest = path / LATEST
    if latest.is_file():
        text = latest.read_text(encoding="utf-8", errors="replace").strip()
        path = path / f"iter_{int(text):07d}" if re.fullmatch(r"[0-9]{1,12}", text) else path
    return path if (path / CONFIG).is_file() and (path / METADATA).is_file() else None


class MegatronReader:
    """The model in an ``iter_…`` folder, its layers stacked in one tensor or each under its own key, experts likewise.

    Where the optimizer's states are there, weights are its FP32 masters.

    Args:
        model_file: the config that says what model it is; default: ``model.yaml`` in or beside the folder.
        weights_only: leave the optimizer's states where they are.
    Raises:
        ConversionError: damaged, not trusted, of another backend, or with states in an arrangement of some layout.
    """

    table: tuple[Line, ...] = MEGATRON_CORE

    def __init__(self, folder: Path, model_file: Path | None, trust: bool, weights_only: bool):
        require_trust(folder / METADATA, trust)
        backend = read_json(folder / CONFIG).get("sharded_backend")
        if backend != "torch_dist":
            raise ConversionError(f"{folder / CONFIG}: sharded_backend {backend!r} is not read here; torch_dist is")
        self.path = folder
        self.model = read_model(folder.parent, model_file)
        self._tensors = TorchDistReader(folder)
        self._keys = self._find_keys(weights_only)
        self.kinds: tuple[str, ...] = (WEIGHT, *(k for k in MOMENTS if any(kind == k for kind, _ in self._keys)))
        number = re.fullmatch(r"iter_(\d+)", folder.name)
        self.step = int(number[1]) if number else 0

    def read(self, kind: str, name: str) -> Tensor:
        """A weight or moment of one layer."""
        found = self._find(kind, name)
        if found is None and _EXPERTS in name:
            singly = [
                name.replace(_EXPERTS, f"{_EXPERTS}{expert}.") for expert in range(self.model.experts.num_experts)
            ]
            experts = [tensor for one in singly if (tensor := self._find(kind, one)) is not None]
            found = torch.stack(experts) if experts and len(experts) == len(singly) else None
        if found is None:
            raise ConversionError(f"{self.path}: there is no {kind} of {name}")
        return found

    def _find(self, kind: str, name: str) -> Tensor | None:
        """A tensor that stands under one key, or under one for its gate half and one for its up half."""
        for key, layer in self._spellings(name):
            kinds = (*MASTERS, WEIGHT) if kind == WEIGHT else (kind,)
            if found := [self._keys[one, key] for one in kinds if (one, key) in self._keys]:
                tensor = self._tensors.read(found[0], layer)
                if len(found) > 1:
                    self._require_same(key, tensor, self._tensors.read(found[-1], layer))
                return tensor
        if name.endswith(_HALVES):
            return None
        gate, up = (self._find(kind, name + half) for half in _HALVES)
        return None if gate is None or up is None else torch.cat([gate, up])

    def _require_same(self, key: str, master: Tensor, weight: Tensor) -> None:
        """Holds a master against the weight that was made of it.

        Raises:
            ConversionError: it is another's.
        """
        if not torch.equal(master.to(weight.dtype), weight):
            raise ConversionError(
                f"{self.path}: {key}: the optimizer's master, rounded, is not the weight: one of the two is damaged or "
                "of another save. --weights-only takes the weights alone"
            )

    def names(self) -> Collection[str]:
        """Names of the weights, layer by layer."""
        found = []
        for kind, key in self._keys:
            shape = self._tensors.shape(key) if kind == WEIGHT else None
            if shape is None:
                continue
            if key.startswith("decoder.layers.") and not _LAYER.match(key):
                rest = key.removeprefix("decoder.layers.")
                found += [f"decoder.layers.{layer}.{rest}" for layer in range(shape[0])]
            else:
                found.append(key)
        return {self._spelled(_SINGLY.sub("", name)) for name in found}

    def _find_keys(self, weights_only: bool) -> dict[tuple[str, str], str]:
        """(kind, the weight's key) -> key of the tensor."""
        found = {}
        for key in self._tensors.entries:
            shape, state = self._tensors.shape(key), _STATE.fullmatch(key)
            if "optimizer." not in key:
                if shape is not None:
                    found[WEIGHT, key] = key
            elif state is not None and shape is not None and not weights_only:
                if shape != self._tensors.shape(state[2]):
                    raise _not_by_parameter(self.path, key)
                found[state[1], state[2]] = key
            elif shape is not None and not weights_only:
                raise _not_by_parameter(self.path, key)
        return found

    def _spellings(self, name: str) -> list[tuple[str, int | None]]:
        """Keys under which a tensor may stand, and its place in them."""
        names = [name]
        if name.endswith(_NORM):
            names.append(name.removesuffix(_NORM) + _NORM_OF_LOCAL_SPEC)
        return [place for one in names for place in (_key(one), (one, None))]

    def _spelled(self, name: str) -> str:
        """The name in a file: without Transformer Engine, Megatron-core calls the norm before experts as that before a
        matrix."""
        layer = _LAYER.match(name)
        if layer and int(layer[2]) in mixture_layers(self.model) and name.endswith(_NORM_OF_LOCAL_SPEC):
            return name.removesuffix(_NORM_OF_LOCAL_SPEC) + _NORM
        return name


class MegatronWriter:
    """Writes ``folder/iter_…`` as ``megatron.core.dist_checkpointing`` and Megatron-LM read it.

    Equal layers are stacked along a first dim, as Megatron-core stacks them; each stands by itself where some have
    experts and some have none.

    Args:
        adam: arguments of the run's AdamW, which go into the groups; its defaults for the rest.
        states: write the optimizer's states too.
        spread_experts: for runs that spread experts over ranks, in which these have an optimizer of their own.
    """

    table: tuple[Line, ...] = MEGATRON_CORE

    def __init__(
        self,
        folder: Path,
        model: ModelSpec,
        dtype: torch.dtype,
        file_bytes: int,
        step: int,
        adam: Mapping[str, Any],
        states: bool,
        spread_experts: bool,
    ):
        _require_decoder(model)
        _require_biases(model)
        self.dtype, self._model, self._step, self._adam = dtype, model, step, adam
        self._own_for_experts = spread_experts and bool(model.experts.num_experts)
        self._root, self._folder = folder, folder / f"iter_{step:07d}"
        self._file_bytes = file_bytes
        self._stacked = len(mixture_layers(model)) in (0, model.num_layers)
        self.kinds: tuple[str, ...] = (WEIGHT, *MOMENTS) if states else (WEIGHT,)

    def begin(self, shapes: dict[str, torch.Size]) -> None:
        """Writes all but the tensors."""
        self._folder.mkdir(parents=True)
        write_model(self._root, self._model)
        (self._folder / CONFIG).write_text(json.dumps(_BACKENDS), encoding="utf-8")
        (self._root / LATEST).write_text(str(self._step), encoding="utf-8")
        torch.save(self._common(), self._folder / COMMON)
        self._tensors = TorchDistWriter(self._folder, self._file_bytes)

    def write(self, kind: str, name: str, tensor: Tensor) -> None:
        """The next weight, with its FP32 master where there are states, or a moment."""
        if kind != WEIGHT:
            self._put([kind], name, tensor.float())
            return
        balance_bias = name.endswith("expert_bias")
        self._put([], name, tensor.float() if balance_bias else tensor.to(self.dtype))
        if len(self.kinds) > 1 and not balance_bias:
            self._put(MASTERS, name, tensor.float())

    def finish(self) -> None:
        """Writes the empty extra states and the metadata."""
        layers = self._model.num_layers
        for layer in range(layers):
            number, place, whole = ("", [layer], [layers]) if self._stacked else (f"{layer}.", [], [])
            for module, experts in extra_states(self._model, layer):
                key = f"decoder.layers.{number}{module}._extra_state"
                for expert in range(max(experts, 1)):
                    at, of = ([*place, expert], [*whole, experts]) if experts else (place or [0], whole or [1])
                    self._tensors.write_object(f"{key}/shard_{_dotted(at)}_{_dotted(of)}", [None])
        self._tensors.finish()

    def _put(self, states: Sequence[str], name: str, tensor: Tensor) -> None:
        """A weight, or what stands for it under the names of some of the optimizers' states."""
        key, layer = _key(name) if self._stacked else (name, None)
        keys = [state_key(state, key) for state in states] or [key]
        if layer is None:
            self._tensors.write(keys, tensor, [0] * tensor.dim(), list(tensor.shape))
        else:
            shape = [self._model.num_layers, *tensor.shape]
            self._tensors.write(keys, tensor[None], [layer] + [0] * tensor.dim(), shape)

    def _common(self) -> dict[str, Any]:
        """What all ranks share."""
        common = {"iteration": self._step, "checkpoint_version": 3.0, "content_metadata": CONTENT}
        if len(self.kinds) == 1:
            return common
        return common | {"optimizer": common_states(self._step, self._adam, self._own_for_experts)}


def _require_decoder(model: ModelSpec) -> None:
    """Checks that the model is one of Megatron-core's GPT models.

    Raises:
        ConversionError: names what they don't have.
    """
    others = {
        "model.blocks bidirectional": "bidirectional" in model.blocks,
        "model.norm.placement post": model.norm.placement == "post",
        "model.norm.embedding": model.norm.embedding,
        "model.positions.num_token_types": model.positions.num_token_types > 0,
        "model.head_transform": model.head_transform,
    }
    if found := [name for name, has in others.items() if has]:
        raise ConversionError(f"Megatron-core's GPT, which is written here, has no place for {', '.join(found)}")


def _require_biases(model: ModelSpec) -> None:
    """Checks that Megatron-core has a model with these biases: in every matrix, in none, or in those of queries, keys
    and values alone (``add_bias_linear``, ``add_qkv_bias``).

    Raises:
        ConversionError: it has none.
    """
    if model.attention.bias != model.feed_forward.bias:
        of = ("the feed-forward", "the attention") if model.feed_forward.bias else ("the attention", "the feed-forward")
        raise ConversionError(f"Megatron-core has no model with biases in {of[0]} and none in {of[1]}")


def _key(name: str) -> tuple[str, int | None]:
    """The key under which all layers are stacked, and the layer."""
    layer = _LAYER.match(name)
    return (_LAYER.sub(r"\1", name), int(layer[2])) if layer else (name, None)


def _dotted(numbers: list[int]) -> str:
    return ".".join(map(str, numbers))


def _not_by_parameter(folder: Path, key: str) -> ConversionError:
    return ConversionError(
        f"{folder}: the optimizer's states, like {key}, are not stored parameter by parameter: save them with "
        "--dist-ckpt-optim-fully-reshardable (distrib_optim_sharding_type fully_reshardable), or leave them behind "
        "with --weights-only"
    )
