"""DeepSpeed's checkpoints: ZeRO 1 to 3 in the ranks' flat partitions, universal ones in a folder for each parameter.

The files are pickles. They are opened as numbers only, with stand-ins for the few classes of DeepSpeed in them.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatrain.convert.checksums import archive_name
from megatrain.convert.deepspeed.experts import (
    FamilyNames,
    Piece,
    expert_files,
    ranks_of_groups,
    require_same,
    require_unfolded,
)
from megatrain.convert.deepspeed.names import TensorRanks, names_of
from megatrain.convert.errors import ConversionError
from megatrain.convert.model_check import require_plausible, require_tied
from megatrain.convert.model_file import read_model
from megatrain.convert.pickles import load_trusted, require_trust, stand_in
from megatrain.convert.table import their_shapes
from megatrain.spec.kinds import MOMENTS, WEIGHT
from megatrain.spec.schema import ModelSpec

MODEL_STATES, OPTIMIZER_STATES, LATEST = "_model_states.pt", "_optim_states.pt", "latest"
UNIVERSAL_NAMES = {WEIGHT: "fp32"} | {moment: moment for moment in MOMENTS}
STAND_INS: dict[str, Any] = {
    name: stand_in(name)
    for name in (
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    )
}
STAND_INS["types.SimpleNamespace"] = SimpleNamespace
_HEAD = "lm_head.weight"
_PIPELINE_LAYER = re.compile(r"layer_\d+(-model_\d+)?-model_states\.pt$")
_OWN_NAME = re.compile(r"mp_rank_\d+_(model|optim)_states$")
_RANKS = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)")


def tag_folder(path: Path) -> Path:
    """``path`` itself, or the checkpoint in it that ``latest`` (or ``latest_universal``) names."""
    for name in (LATEST, f"{LATEST}_universal"):
        if (path / name).is_file():
            tag = (path / name).read_text(encoding="utf-8").strip()
            if Path(tag).name == tag and (path / tag).is_dir():
                return path / tag
    return path


def zero_states(folder: Path) -> list[Path]:
    """The ranks' files of the states that ZeRO shares."""
    return [file for file in sorted(folder.glob(f"*{OPTIMIZER_STATES}")) if _RANKS.match(file.name)]


def pipeline_layers(folder: Path) -> list[Path]:
    """Files of a pipeline's layers, by layer; where there are tensor ranks, their names end with one."""
    return sorted(file for file in folder.glob("layer_*-model_states.pt") if _PIPELINE_LAYER.match(file.name))


def is_universal(path: Path) -> bool:
    """Whether the folder holds a universal checkpoint."""
    return (tag_folder(path) / "zero").is_dir()


def is_zero(path: Path) -> bool:
    """Whether the folder holds a ZeRO checkpoint, or the layers of a pipeline."""
    folder = tag_folder(path)
    return not is_universal(path) and bool(any(folder.glob(f"*{OPTIMIZER_STATES}")) or pipeline_layers(folder))


@dataclass(frozen=True)
class _Flat:
    """Where a parameter stands in the flat partitions of a group, and which data-parallel ranks hold these in turn.

    It is ``piece`` of the ``size`` elements from ``start`` on.
    """

    group: int
    start: int
    size: int
    piece: Piece
    ranks: range


class ZeroReader:
    """A ZeRO checkpoint of any number of data-parallel and tensor ranks, over which experts may be spread.

    Raises:
        ConversionError: not trusted, incomplete or damaged, or without ZeRO.
    """

    def __init__(self, path: Path, model_file: Path | None, trust: bool):
        self.path = folder = tag_folder(path)
        _require_zero(folder)
        model_ranks = sorted({_ranks(file)[1] for file in zero_states(folder)})
        require_trust(zero_states(folder)[0], trust)
        self.model = read_model(folder.parent, model_file)
        self._parts = [_ModelRank(folder, model_rank, self.model) for model_rank in model_ranks]
        require_plausible(self.model, self.names(), folder)
        self.table = names_of(self.model, self.names())
        self._tensor_ranks = TensorRanks(self.table, self.model)
        self.kinds, self.step = self._parts[0].kinds, self._parts[0].step

    def read(self, kind: str, name: str) -> Tensor:
        """A tensor, FP32, put together from the ranks' parts."""
        return self._tensor_ranks.join(name, [part.read(kind, name) for part in self._parts if name in part.places])

    def names(self) -> Collection[str]:
        """Names of the trained parameters."""
        return {name for part in self._parts for name in part.places}


class _ModelRank:
    """What the data-parallel ranks of one tensor rank saved."""

    def __init__(self, folder: Path, model_rank: int, model: ModelSpec):
        files = {_ranks(file)[0]: file for file in zero_states(folder) if _ranks(file)[1] == model_rank}
        experts = expert_files(folder, model_rank)
        states = [f for f in sorted(folder.glob(f"*mp_rank_{model_rank:02d}{MODEL_STATES}")) if f not in experts]
        if not states or sorted(files) != list(range(len(files))):
            raise ConversionError(
                f"{folder}: states of ranks are missing; of model rank {model_rank} there are {sorted(files)}"
            )
        head = load_file(states[0])
        require_unfolded(head, states[0])
        names = FamilyNames(model, head) if experts or head.get("ds_autoep_layers") else None
        self._folder = folder
        loaded = [load_file(files[rank]) for rank in sorted(files)]
        self._ranks = [found["optimizer_state_dict"] for found in loaded]
        self._stage3 = "fp32_flat_groups" in self._ranks[0]
        self.places = self._find_places(head["param_shapes"], loaded[0].get("ds_config") or {}, names)
        # what the masters are held against: ZeRO 3 leaves the modules' weights empty
        self._modules = _renamed(head.get("module") or {}, names)
        for file in experts:
            self._modules |= _renamed(load_file(file), names)
        base = self._base_state(0)
        self.kinds: tuple[str, ...] = (
            WEIGHT,
            *(kind for kind in MOMENTS if base and kind in base[0]),
        )
        self.step = int(head.get("global_steps") or 0)

    def read(self, kind: str, name: str) -> Tensor:
        """This rank's part of a tensor, FP32."""
        place = self.places[name]
        parts = [self._flat(rank, kind, place.group) for rank in place.ranks]
        try:
            start, numel = place.piece.start, place.piece.shape.numel()
            if self._stage3:  # it splits each parameter by itself, the last part padded
                length = math.ceil(place.size / len(parts))
                flat = _region([part.narrow(0, place.start, length) for part in parts], start, numel)
            else:
                flat = _region(parts, place.start + start, numel)
            tensor = flat.view(place.piece.shape)
        except RuntimeError as error:
            raise ConversionError(f"{self._folder}: {kind} of {name}: {error}") from error
        module = self._modules.get(name) if kind == WEIGHT else None
        if module is not None and module.numel():
            require_same(name, tensor, module, f"the modules in {self._folder}")
        return tensor

    def _flat(self, rank: int, kind: str, group: int) -> Tensor:
        if kind != WEIGHT:
            return self._base_state(rank)[group][kind]
        groups = self._ranks[rank]["fp32_flat_groups" if self._stage3 else "single_partition_of_fp32_groups"]
        return groups[group].detach()

    def _base_state(self, rank: int) -> dict[int, Any]:
        return self._ranks[rank]["optimizer_state_dict" if self._stage3 else "base_optimizer_state"]["state"]

    def _find_places(
        self, groups: list[dict[str, torch.Size]], settings: dict[str, Any], names: FamilyNames | None
    ) -> dict[str, _Flat]:
        """The first rank's names and shapes are those of all, but for the numbers of its experts."""
        places: dict[str, _Flat] = {}
        holders = ranks_of_groups(self._ranks[0], settings, len(self._ranks), len(groups))
        for number, shapes in enumerate(groups):
            start = 0
            paddings = (self._ranks[0].get("param_alignment_paddings") or {number: [0] * len(shapes)})[number]
            for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
                whole, num_expert_ranks = torch.Size(shape), len(holders[number])
                size = whole.numel()
                for rank, ranks in enumerate(holders[number]):
                    pieces = names.pieces(name, whole, rank, num_expert_ranks) if names else [Piece(name, 0, whole)]
                    places |= {piece.name: _Flat(number, start, size, piece, ranks) for piece in pieces}
                start += math.ceil(size / len(holders[number][0])) if self._stage3 else size + padding
        return places


def load_file(file: Path) -> Any:
    """What one of DeepSpeed's files holds.

    Raises:
        ConversionError: damaged, or saved under another rank's name.
    """
    saved_as = archive_name(file)
    if _OWN_NAME.search(saved_as) and saved_as != file.stem:
        raise ConversionError(f"{file} was saved as {saved_as}.pt: files of two ranks have changed places")
    return load_trusted(file, STAND_INS)


def _renamed(module: Mapping[str, Any], names: FamilyNames | None) -> dict[str, Tensor]:
    """The tensors of a module, under the family's names."""
    tensors = {name: tensor for name, tensor in module.items() if isinstance(tensor, Tensor)}
    return tensors if names is None else {names.name(name): tensor for name, tensor in tensors.items()}


def _require_zero(folder: Path) -> None:
    if layers := pipeline_layers(folder):
        raise ConversionError(
            f"{folder} is of a pipeline, whose modules have numbers for names, like {layers[0].name}, and is not "
            "read: give the layers' weights Hugging Face's names in a pytorch_model.bin beside a config.json (ten "
            "lines of Python in docs/conversion.md) and convert that with --trust-pickle"
        )
    if not zero_states(folder):
        own = next((file.name for file in sorted(folder.glob(f"*{OPTIMIZER_STATES}"))), "none")
        raise ConversionError(
            f"{folder}: the states of the optimizer (in {own}) were saved without ZeRO, under numbers, and are not "
            "read: --weights-only takes the weights, in the type of the modules"
        )


class UniversalReader:
    """A universal checkpoint.

    Raises:
        ConversionError: not trusted or incomplete.
    """

    def __init__(self, path: Path, model_file: Path | None, trust: bool):
        self.path = folder = tag_folder(path)
        self._names = {
            file.parent.relative_to(folder / "zero").as_posix() for file in (folder / "zero").rglob("fp32.pt")
        }
        require_trust(folder / "zero", trust)
        self.model = read_model(folder.parent, model_file)
        require_plausible(self.model, self._names, folder)
        self.table = names_of(self.model, self._names)
        self._shapes = {
            name: shape
            for entry, shapes in their_shapes(self.table, self.model)
            for name, shape in zip(entry.theirs, shapes, strict=True)
        }
        first = folder / "zero" / next(iter(self._names), "")
        self.kinds: tuple[str, ...] = tuple(
            kind for kind, file in UNIVERSAL_NAMES.items() if (first / f"{file}.pt").is_file()
        )
        self.step = int(load_trusted(first / "step.pt", STAND_INS)) if (first / "step.pt").is_file() else 0
        self._tensor_ranks = TensorRanks(self.table, self.model)
        heads = [load_file(file) for file in sorted(folder.glob(f"mp_rank_*{MODEL_STATES}"))]
        self._modules = [_renamed(head.get("module") or {}, None) for head in heads]
        self._require_one_head()

    def read(self, kind: str, name: str) -> Tensor:
        """A tensor, FP32."""
        file = self.path / "zero" / name / f"{UNIVERSAL_NAMES[kind]}.pt"
        if not file.is_file():
            raise ConversionError(f"{file} is missing")
        value = load_trusted(file, STAND_INS)
        tensor = value["param"] if isinstance(value, dict) else value
        try:
            whole = tensor.view(self._shapes[name])
        except RuntimeError as error:
            raise ConversionError(f"{file}: {error}") from error
        parts = [module[name] for module in self._modules if name in module and module[name].numel()]
        if kind == WEIGHT and parts:
            require_same(name, whole, self._tensor_ranks.join(name, parts), f"the modules in {self.path}")
        return whole

    def names(self) -> Collection[str]:
        """Names of the parameters; a tied head that has a copy does not count."""
        return self._names - ({_HEAD} if self.model.tie_embeddings else set())

    def _require_one_head(self) -> None:
        word = next(str(line.theirs) for line in self.table if line.ours == "embedding.word.weight")
        if self.model.tie_embeddings and {_HEAD, word} <= self._names:
            head = load_trusted(self.path / "zero" / _HEAD / "fp32.pt", STAND_INS)
            head = head["param"] if isinstance(head, dict) else head
            require_tied(head.view(self._shapes[word]), self.read(WEIGHT, word), f"{self.path}: {_HEAD}")


def _ranks(file: Path) -> tuple[int, int]:
    """(data-parallel rank, model-parallel rank) in a file's name."""
    found = _RANKS.search(file.name)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _region(parts: list[Tensor], start: int, size: int) -> Tensor:
    """``size`` elements from ``start`` on of the parts behind one another."""
    found, begin = [], 0
    for part in parts:
        first, last = max(start, begin), min(start + size, begin + part.numel())
        if first < last:
            found.append(part[first - begin : last - begin])
        begin += part.numel()
    return torch.cat(found)
