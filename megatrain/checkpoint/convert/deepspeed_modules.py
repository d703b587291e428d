"""DeepSpeed's checkpoints of models whose experts are spread over ranks by DeepSpeed's own layer: the modules' weights.

Everything but the experts stands in ``mp_rank_…``, each expert of each layer in a file of its own.
"""

import re
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

from torch import Tensor

from megatrain.checkpoint.convert.deepspeed_names import TensorRanks
from megatrain.checkpoint.convert.deepspeed_read import MODEL_STATES, STAND_INS, spread_experts, tag_folder
from megatrain.checkpoint.convert.errors import ConversionError
from megatrain.checkpoint.convert.hf_config import family_of_model
from megatrain.checkpoint.convert.model_file import read_model
from megatrain.checkpoint.convert.pickles import load_trusted, require_trust
from megatrain.checkpoint.convert.table import WEIGHT

_LAYER_OF_EXPERTS = re.compile(r"^(.*\.)[a-z_]+\.deepspeed_moe\.(gate\.wg|experts\.deepspeed_experts)\.")
_ROUTER = "layers.{}.feed_forward.router.weight"


class ModulesReader:
    """Weights in the type in which the modules hold them, of any number of tensor ranks.

    A layer of experts that stands in a block of a family of Hugging Face's is taken for the family's own: its gate for
    the router, its experts, whose matrices have the family's names, for the experts.

    Raises:
        ConversionError: not trusted or damaged.
    """

    kinds: tuple[str, ...] = (WEIGHT,)

    def __init__(self, path: Path, model_file: Path | None, trust: bool):
        self.path = folder = tag_folder(path)
        states = sorted(folder.glob(f"mp_rank_*{MODEL_STATES}"))
        if not states:
            raise ConversionError(f"{folder} holds no mp_rank_…{MODEL_STATES}")
        require_trust(states[0], trust)
        self.model = read_model(folder.parent, model_file)
        family = family_of_model(self.model)
        self.table = family.lines
        router = next(str(line.theirs) for line in family.lines if line.ours == _ROUTER)
        self._module = router.removesuffix(".gate.weight").rpartition(".")[2]
        self._parts: dict[str, list[Tensor]] = defaultdict(list)
        heads = [load_trusted(file, STAND_INS) for file in states]
        for module in (
            *(head["module"] for head in heads),
            *(load_trusted(f, STAND_INS) for f in spread_experts(folder)),
        ):
            for name, tensor in module.items():
                self._parts[self._name(name)].append(tensor)
        self._tensor_ranks = TensorRanks(self.table, self.model)
        self.step = int(heads[0].get("global_steps") or 0)

    def read(self, kind: str, name: str) -> Tensor:
        """A weight, put together from the tensor ranks' parts."""
        if name not in self._parts:
            raise ConversionError(f"{self.path} has no tensor {name}")
        return self._tensor_ranks.join(name, self._parts[name])

    def names(self) -> Collection[str]:
        """Of the weights; a tied head does not count."""
        return self._parts.keys() - ({"lm_head.weight"} if self.model.tie_embeddings else set())

    def _name(self, name: str) -> str:
        found = _LAYER_OF_EXPERTS.match(name)
        if found is None:
            return name
        part = "gate" if found[2] == "gate.wg" else "experts"
        return f"{found[1]}{self._module}.{part}.{name[found.end() :]}"
