"""DeepSpeed's own layer of experts: its names, which ranks hold which expert, and the files of single experts.

Ranks number their own experts from 0 on; the files of single experts, and the names here, number all of a layer.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from megatrain.checkpoint.convert.errors import ConversionError
from megatrain.checkpoint.convert.hf_config import family_of_model
from megatrain.config.schema import ModelConfig

_IN_LAYER = re.compile(r"^(.*\.)[a-z_]+\.deepspeed_moe\.(gate\.wg|experts\.deepspeed_experts)\.")
_EXPERT = re.compile(r"(?<=\.experts\.deepspeed_experts\.)\d+")
_ROUTER = "layers.{}.feed_forward.router.weight"


def expert_files(folder: Path, model_rank: int | None = None) -> list[Path]:
    """Files of single experts, those of one tensor rank or all."""
    rank = "*" if model_rank is None else f"{model_rank:02d}"
    return sorted(folder.glob(f"layer_*_expert_*_mp_rank_{rank}_model_states.pt"))


class FamilyNames:
    """Names of a family's files for those of a model in which DeepSpeed's layer takes the place of the family's own.

    Its gate stands for the router, its experts, whose matrices have the family's names, for the experts.
    """

    def __init__(self, model: ModelConfig):
        lines = family_of_model(model).lines
        router = next((str(line.theirs) for line in lines if line.ours == _ROUTER), "")
        self._module = router.removesuffix(".gate.weight").rpartition(".")[2]
        self._num_experts = model.num_experts or 0

    def name(self, name: str) -> str:
        """Of a parameter, its expert numbered in the whole layer."""
        found = _IN_LAYER.match(name)
        if found is None:
            return name
        part = "gate" if found[2] == "gate.wg" else "experts"
        return f"{found[1]}{self._module}.{part}.{name[found.end() :]}"

    def of_rank(self, name: str, expert_rank: int, num_expert_ranks: int) -> str:
        """Of a parameter, its expert numbered on one of the ranks that share them."""
        first = expert_rank * (self._num_experts // num_expert_ranks)
        return self.name(_EXPERT.sub(lambda found: str(first + int(found[0])), name))


def ranks_of_groups(
    states: Mapping[str, Any], settings: Mapping[str, Any], num_ranks: int, num_groups: int
) -> list[list[range]]:
    """For each parameter group and each rank of its expert axis, which data-parallel ranks hold its partitions in turn.

    A group of other parameters has one such rank, and all data-parallel ranks hold its partitions.

    Args:
        states: a rank's of the optimizer; settings: DeepSpeed's config.
    Raises:
        ConversionError: the ranks don't share the group evenly.
    """
    counts = states.get("partition_count")
    counts = counts if isinstance(counts, (list, tuple)) else [num_ranks] * num_groups  # ZeRO 3
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


def require_own_layer(head: Mapping[str, Any], file: Path) -> None:
    """Checks that a model's experts are not those of DeepSpeed's AutoEP, which have other names and files.

    Raises:
        ConversionError: they are.
    """
    if head.get("ds_autoep_layers"):
        raise ConversionError(
            f"{file} is of a model whose experts DeepSpeed's AutoEP spread over ranks, and is not read: give its "
            "weights Hugging Face's names in a pytorch_model.bin beside a config.json and convert that"
        )


def require_same(name: str, master: Tensor, module: Tensor) -> None:
    """Checks that an expert's FP32 master is that of the module's weight, which its own file names.

    Raises:
        ConversionError: it is another's.
    """
    if master.shape != module.shape or not master.to(module.dtype).equal(module):
        raise ConversionError(f"{name}: the optimizer's weight is not that of the file of this expert")
