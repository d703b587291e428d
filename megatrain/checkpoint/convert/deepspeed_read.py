"""DeepSpeed's checkpoints: ZeRO 1 to 3 in the ranks' flat partitions, universal ones in a folder for each parameter.

The files are pickles. They are opened as numbers only, with stand-ins for the few classes of DeepSpeed in them.
"""

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatrain.checkpoint.convert.deepspeed_names import TensorRanks, names_of
from megatrain.checkpoint.convert.errors import ConversionError
from megatrain.checkpoint.convert.model_file import read_model
from megatrain.checkpoint.convert.pickles import load_trusted, require_trust, stand_in
from megatrain.checkpoint.convert.table import WEIGHT, their_shapes

MODEL_STATES, OPTIMIZER_STATES, LATEST = "_model_states.pt", "_optim_states.pt", "latest"
UNIVERSAL_NAMES = {WEIGHT: "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
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
_PIPELINE_LAYER = re.compile(r"layer_\d+(-model_\d+)?-model_states\.pt$")
_RANKS = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)")


def tag_folder(path: Path) -> Path:
    """``path`` itself, or the checkpoint in it that ``latest`` (or ``latest_universal``) names."""
    for name in (LATEST, f"{LATEST}_universal"):
        if (path / name).is_file():
            tag = (path / name).read_text(encoding="utf-8").strip()
            if Path(tag).name == tag and (path / tag).is_dir():
                return path / tag
    return path


def spread_experts(folder: Path) -> list[Path]:
    """Files of single experts, as DeepSpeed's own layer of experts has them."""
    return sorted(folder.glob(f"layer_*_expert_*{MODEL_STATES}"))


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
    """Where a parameter stands in the flat partitions of a group."""

    group: int
    start: int
    shape: torch.Size


class ZeroReader:
    """A ZeRO checkpoint of any number of data-parallel and tensor ranks.

    Raises:
        ConversionError: not trusted, incomplete or damaged, or its experts are spread over ranks.
    """

    def __init__(self, path: Path, model_file: Path | None, trust: bool):
        self.path = folder = tag_folder(path)
        if layers := pipeline_layers(folder):
            raise ConversionError(
                f"{folder} is of a pipeline, whose modules have numbers for names, like {layers[0].name}, and is not "
                "read: give the layers' weights Hugging Face's names in a pytorch_model.bin beside a config.json (ten "
                "lines of Python in docs/conversion.md) and convert that with --trust-pickle"
            )
        if spread_experts(folder):
            own = next((file.name for file in sorted(folder.glob("*expp_rank_*"))), "expp_rank_…")
            raise ConversionError(
                f"{folder}: its experts are spread over ranks, and the states of their optimizer (in {own}) are not "
                "read: --weights-only takes the weights, in the type of the modules"
            )
        model_ranks = sorted({_ranks(file)[1] for file in folder.glob(f"*{OPTIMIZER_STATES}")})
        self._parts = [_ModelRank(folder, model_rank, trust) for model_rank in model_ranks]
        self.model = read_model(folder.parent, model_file)
        self.table = names_of(self.model, self.names())
        self._tensor_ranks = TensorRanks(self.table, self.model)
        self.kinds, self.step = self._parts[0].kinds, self._parts[0].step

    def read(self, kind: str, name: str) -> Tensor:
        """A tensor, FP32, put together from the ranks' parts."""
        return self._tensor_ranks.join(name, [part.read(kind, name) for part in self._parts if name in part.places])

    def names(self) -> Collection[str]:
        """Of the trained parameters."""
        return {name for part in self._parts for name in part.places}


class _ModelRank:
    """What the data-parallel ranks of one tensor rank saved."""

    def __init__(self, folder: Path, model_rank: int, trust: bool):
        files = {_ranks(file)[0]: file for file in folder.glob(f"*_mp_rank_{model_rank:02d}{OPTIMIZER_STATES}")}
        states = sorted(folder.glob(f"*mp_rank_{model_rank:02d}{MODEL_STATES}"))
        if not states or sorted(files) != list(range(len(files))):
            raise ConversionError(
                f"{folder}: states of ranks are missing; of model rank {model_rank} there are {sorted(files)}"
            )
        require_trust(states[0], trust)
        head = load_trusted(states[0], STAND_INS)
        self._folder = folder
        self._ranks = [load_trusted(files[rank], STAND_INS)["optimizer_state_dict"] for rank in sorted(files)]
        self._stage3 = "fp32_flat_groups" in self._ranks[0]
        self.places = self._find_places(head["param_shapes"])
        base = self._base_state(0)
        self.kinds: tuple[str, ...] = (
            WEIGHT,
            *(kind for kind in ("exp_avg", "exp_avg_sq") if base and kind in base[0]),
        )
        self.step = int(head.get("global_steps") or 0)

    def read(self, kind: str, name: str) -> Tensor:
        """This rank's part of a tensor, FP32."""
        place = self.places[name]
        parts = [self._flat(rank, kind, place.group) for rank in range(len(self._ranks))]
        try:
            whole = (
                self._from_stage3(parts, place) if self._stage3 else _region(parts, place.start, place.shape.numel())
            )
            return whole.view(place.shape)
        except RuntimeError as error:
            raise ConversionError(f"{self._folder}: {kind} of {name}: {error}") from error

    def _flat(self, rank: int, kind: str, group: int) -> Tensor:
        if kind != WEIGHT:
            return self._base_state(rank)[group][kind]
        groups = self._ranks[rank]["fp32_flat_groups" if self._stage3 else "single_partition_of_fp32_groups"]
        return groups[group].detach()

    def _base_state(self, rank: int) -> dict[int, Any]:
        return self._ranks[rank]["optimizer_state_dict" if self._stage3 else "base_optimizer_state"]["state"]

    def _find_places(self, groups: list[dict[str, torch.Size]]) -> dict[str, _Flat]:
        places, num_ranks = {}, len(self._ranks)
        for number, shapes in enumerate(groups):
            start = 0
            paddings = (self._ranks[0].get("param_alignment_paddings") or {number: [0] * len(shapes)})[number]
            for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
                places[name] = _Flat(number, start, torch.Size(shape))
                size = torch.Size(shape).numel()
                start += math.ceil(size / num_ranks) if self._stage3 else size + padding
        return places

    def _from_stage3(self, parts: list[Tensor], place: _Flat) -> Tensor:
        """ZeRO 3 splits each parameter by itself, the last part padded."""
        size = place.shape.numel()
        length = math.ceil(size / len(parts))
        return torch.cat([part.narrow(0, place.start, length) for part in parts])[:size]


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

    def read(self, kind: str, name: str) -> Tensor:
        """A tensor, FP32."""
        file = self.path / "zero" / name / f"{UNIVERSAL_NAMES[kind]}.pt"
        if not file.is_file():
            raise ConversionError(f"{file} is missing")
        value = load_trusted(file, STAND_INS)
        tensor = value["param"] if isinstance(value, dict) else value
        try:
            return tensor.view(self._shapes[name])
        except RuntimeError as error:
            raise ConversionError(f"{file}: {error}") from error

    def names(self) -> Collection[str]:
        """Of the parameters; a tied head that has a copy does not count."""
        return self._names - ({"lm_head.weight"} if self.model.tie_embeddings else set())


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
