"""DeepSpeed's layers of experts, its own and AutoEP's: names, which ranks hold which expert, files of single ones.

Ranks number their own experts from 0 on; the files of single experts, and the names here, number all of a layer.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain.convert.errors import ConversionError
from megatrain.convert.huggingface.config import family_of_model
from megatrain.spec.schema import ModelSpec

_IN_LAYER = re.compile(r"^(.*\.)[a-z_]+\.deepspeed_moe\.(gate\.wg|experts\.deepspeed_experts)\.")
_EXPERT = re.compile(r"(?<=\.experts\.deepspeed_experts\.)\d+")
_AUTOEP_ROUTER = re.compile(r"^(.*\.)[a-z_]+\.(?:router|gate)\.gate\.weight$")
_AUTOEP_EXPERTS = re.compile(r"^(?P<layer>.*)\.experts\.(?P<matrix>w[123])$")
_AUTOEP_EXPERT = re.compile(r"^(?P<layer>.*)\.experts\.(?P<matrix>w[123])\.(?P<expert>\d+)$")
_ROUTER = "layers.{}.feed_forward.router.weight"


@dataclass(frozen=True)
class Piece:
    """A parameter of the family in one that holds several: its name, the first of its elements, its shape."""

    name: str
    start: int
    shape: torch.Size


def expert_files(folder: Path, model_rank: int | None = None) -> list[Path]:
    """Files of single experts, those of one tensor rank or all."""
    rank = "*" if model_rank is None else f"{model_rank:02d}"
    return sorted(folder.glob(f"layer_*_expert_*_mp_rank_{rank}_model_states.pt"))


class FamilyNames:
    """Names of a family's files for those of a model in which DeepSpeed's layers take the place of the family's own.

    Its own layer's gate stands for the router, its experts, whose matrices have the family's names, for the experts.
    AutoEP's layer has a router, and holds each matrix of a rank's experts as one: w1 is the gate, w3 up, w2 down.

    Args:
        head: what the file of the model's states says; where experts lie, if AutoEP spread them.
    """

    def __init__(self, model: ModelSpec, head: Mapping[str, Any]):
        theirs = {line.ours: str(line.theirs) for line in family_of_model(model).lines}
        self._module = theirs.get(_ROUTER, "").removesuffix(".gate.weight").rpartition(".")[2]
        self._matrices = {
            matrix: theirs.get(f"layers.{{}}.feed_forward.experts.{ours}", "").rpartition("{expert}.")[2]
            for matrix, ours in {"w1": "gate", "w3": "up", "w2": "down"}.items()
        }
        self._num_experts = model.experts.num_experts
        self._experts_of_ranks = {
            layer["module_path"]: [rank["experts"] for rank in layer["expert_placement"]["ranks"]]
            for layer in head.get("ds_autoep_layers") or ()
        }

    def name(self, name: str) -> str:
        """A parameter's name, in which its expert is numbered in the whole layer."""
        if found := _IN_LAYER.match(name):
            part = "gate" if found[2] == "gate.wg" else "experts"
            return f"{found[1]}{self._module}.{part}.{name[found.end() :]}"
        if found := _AUTOEP_ROUTER.match(name):
            return f"{found[1]}{self._module}.gate.weight"
        if found := _AUTOEP_EXPERT.match(name):
            return self._of_autoep(found, int(found["expert"]))
        return name

    def pieces(self, name: str, shape: torch.Size, expert_rank: int, num_expert_ranks: int) -> list[Piece]:
        """The family's parameters in that of a rank that shares experts with others.

        Raises:
            ConversionError: the rank holds more or fewer experts than it should.
        """
        first = expert_rank * (self._num_experts // num_expert_ranks)
        fused = _AUTOEP_EXPERTS.match(name)
        if fused is None:
            return [Piece(self.name(_EXPERT.sub(lambda found: str(first + int(found[0])), name)), 0, shape)]
        ranks = self._experts_of_ranks.get(fused["layer"], [])
        experts = ranks[expert_rank] if len(ranks) == num_expert_ranks else []
        if len(experts) != shape[0]:
            raise ConversionError(f"{name} holds {shape[0]} experts of a rank that should have {len(experts)}")
        size = shape[1:].numel()
        return [Piece(self._of_autoep(fused, expert), i * size, shape[1:]) for i, expert in enumerate(experts)]

    def _of_autoep(self, found: re.Match[str], expert: int) -> str:
        before = found["layer"].rpartition(".")[0]
        return f"{before}.{self._module}.experts.{expert}.{self._matrices[found['matrix']]}"


def ranks_of_groups(
    states: Mapping[str, Any], settings: Mapping[str, Any], num_ranks: int, num_groups: int
) -> list[list[range]]:
    """Which data-parallel ranks hold the partitions in turn, for each parameter group and each rank of its expert axis.

    A group of other parameters has one such rank, and all data-parallel ranks hold its partitions.

    Args:
        states: a rank's of the optimizer; settings: DeepSpeed's config.
    Raises:
        ConversionError: the ranks don't share the group evenly.
    """
    counts = states.get("partition_count")
    if not isinstance(counts, (list, tuple)):  # ZeRO 3
        groups = states.get("ds_zero_partition_groups") or [{"partition_count": num_ranks}] * num_groups
        counts = [group["partition_count"] for group in groups]
    found = []
    for count in counts:
        if num_ranks % count:
            raise ConversionError(f"{num_ranks} data-parallel ranks cannot share {count} partitions of experts evenly")
        size = num_ranks // count
        if settings.get("use_data_before_expert_parallelism"):
            found.append([range(first, first + count) for first in range(0, num_ranks, count)])
        else:
            found.append([range(first, num_ranks, size) for first in range(size)])
    return found


def require_unfolded(head: Mapping[str, Any], file: Path) -> None:
    """Checks that AutoEP's experts are not spread over the ranks of a tensor axis too.

    Raises:
        ConversionError: they are.
    """
    if head.get("folding"):
        raise ConversionError(
            f"{file} is of a model whose experts DeepSpeed's AutoEP folded over tensor ranks, and is not read: give "
            "its weights Hugging Face's names in a pytorch_model.bin beside a config.json and convert that"
        )


def require_same(name: str, master: Tensor, module: Tensor, whose: str = "the file of this expert") -> None:
    """Checks that a parameter's FP32 master is that of the module's weight.

    Args:
        whose: where the module's weight stands.
    Raises:
        ConversionError: it is another's.
    """
    if master.shape != module.shape or not master.to(module.dtype).equal(module):
        raise ConversionError(
            f"{name}: the optimizer's weight, rounded, is not that of {whose}: files of other ranks or other saves "
            "stand in for one another here"
        )
