"""DeepSpeed's checkpoints of models whose experts are spread over ranks by DeepSpeed's layers: the modules' weights.

Everything but the experts stands in ``mp_rank_…``, each expert of each layer in a file of its own.
"""

from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

from torch import Tensor

from megatrain.convert.deepspeed.experts import FamilyNames, expert_files, require_unfolded
from megatrain.convert.deepspeed.names import TensorRanks
from megatrain.convert.deepspeed.read import MODEL_STATES, load_file, tag_folder
from megatrain.convert.errors import ConversionError
from megatrain.convert.huggingface.config import family_of_model
from megatrain.convert.model_check import require_plausible, require_tied
from megatrain.convert.model_file import read_model
from megatrain.convert.pickles import require_trust
from megatrain.spec.kinds import WEIGHT

_HEAD = "lm_head.weight"


class ModulesReader:
    """Weights in the type in which the modules hold them, of any number of tensor ranks.

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
        self.table = family_of_model(self.model).lines
        heads = [load_file(file) for file in states]
        require_unfolded(heads[0], states[0])
        names = FamilyNames(self.model, heads[0])
        experts = [load_file(file) for file in expert_files(folder)]
        self._parts: dict[str, list[Tensor]] = defaultdict(list)
        for module in (*(head["module"] for head in heads), *experts):
            for name, tensor in module.items():
                self._parts[names.name(name)].append(tensor)
        require_plausible(self.model, self._parts, folder)
        self._tensor_ranks = TensorRanks(self.table, self.model)
        word = next(str(line.theirs) for line in self.table if line.ours == "embedding.word.weight")
        if self.model.tie_embeddings and {_HEAD, word} <= self._parts.keys():
            for head, table in zip(self._parts[_HEAD], self._parts[word], strict=False):
                require_tied(head, table, f"{folder}: {_HEAD}")
        self.step = int(heads[0].get("global_steps") or 0)

    def read(self, kind: str, name: str) -> Tensor:
        """A weight, put together from the tensor ranks' parts."""
        if name not in self._parts:
            raise ConversionError(f"{self.path} has no tensor {name}")
        return self._tensor_ranks.join(name, self._parts[name])

    def names(self) -> Collection[str]:
        """Names of the weights; a tied head does not count."""
        return self._parts.keys() - ({_HEAD} if self.model.tie_embeddings else set())
