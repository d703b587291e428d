"""Models in Hugging Face's folders: config.json, safetensors, generation_config.json, tokenizer."""

import functools
import re
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from megatrain.checkpoint.store.tokenizer_file import CarriedTokenizer
from megatrain.convert.errors import ConversionError
from megatrain.convert.huggingface import bin_files, safetensors_files
from megatrain.convert.huggingface.bin_files import BinReader
from megatrain.convert.huggingface.config import (
    config_from_model,
    family_of_config,
    family_of_model,
    model_from_config,
)
from megatrain.convert.huggingface.safetensors_files import SafetensorsReader, SafetensorsWriter
from megatrain.convert.huggingface.tokenizer import (
    CONFIG,
    IDS,
    read_json,
    special_ids,
    with_end,
    write_generation,
    write_json,
    write_tokenizer,
)
from megatrain.convert.model_check import require_plausible, require_tied
from megatrain.convert.pickles import require_trust
from megatrain.spec.derive import num_tokens
from megatrain.spec.kinds import WEIGHT
from megatrain.spec.schema import ModelSpec

ADAPTER = "adapter_config.json"
# masks, frequencies and positions that older files hold beside the weights
_BUFFERS = re.compile(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$|embeddings\.(position|token_type)_ids$")


class HuggingFaceReader:
    """A folder with ``config.json`` and safetensors, or ``pytorch_model.bin`` where there are none.

    Args:
        trust: open the latter, a pickle.
    Raises:
        ConversionError: a file is missing or damaged, or the model is none that is computed here.
    """

    kinds: tuple[str, ...] = (WEIGHT,)
    step = 0

    def __init__(self, folder: Path, vocab_multiple: int = 1, trust: bool = False):
        self.path = folder
        if (folder / ADAPTER).is_file():
            raise ConversionError(f"{folder / ADAPTER}: the folder holds an adapter: merge it into its model first")
        self.config = read_json(folder / CONFIG)
        self.family = family_of_config(self.config)
        try:
            self.model, self.table = model_from_config(self.config, vocab_multiple), self.family.lines
        except RecursionError as error:
            raise ConversionError(f"{folder / CONFIG}: nested too deeply") from error
        self._tensors = _tensors(folder, trust)
        there = self._tensors.names()
        require_plausible(self.model, there, folder)
        if self.model.experts.num_experts > len(there):
            raise ConversionError(
                f"{folder}: {len(there)} tensors are not those of {self.model.experts.num_experts} experts"
            )
        self._prefix = "" if any(name.startswith(self.family.prefix) for name in there) else self.family.prefix
        self._names = self._known_names()
        self._require_copies()

    @property
    def dtype(self) -> torch.dtype:
        """The smallest type that holds every weight as it stands in the files."""
        return functools.reduce(torch.promote_types, map(self._tensors.dtype_of, self._tensors.names()))

    def read(self, kind: str, name: str) -> Tensor:
        """A weight, in the type of the file."""
        return self._tensors.read(self._names.get(name, name))

    def names(self) -> Collection[str]:
        """Names of the weights; a tied head that was stored all the same does not count, nor do other copies."""
        return self._names.keys() - self._copies().keys()

    def _known_names(self) -> dict[str, str]:
        """As today's files have them, of all that counts -> as this one has them."""
        names, left = {}, []
        for name in self._tensors.names():
            known = name if name == self.family.head else self._prefix + name
            for before, now in self.family.older.items():
                known = known.removesuffix(before) + now if known.endswith(before) else known
            if known.startswith(self.family.left_out or ("\0",)):
                left.append(known)
            elif not _BUFFERS.search(known):
                names[known] = name
        if left:
            print(f"{', '.join(sorted(left))} stay behind: {self.family.architecture} has no use for them")
        return names

    def _copies(self) -> dict[str, str]:
        """Tensors that the config says are others under a second name -> these."""
        word = next(str(line.theirs) for line in self.table if line.ours == "embedding.word.weight")
        return {**self.family.copies, **({self.family.head: word} if self.model.tie_embeddings else {})}

    def _require_copies(self) -> None:
        """Checks that a head which the config ties is the word embedding, and other copies likewise.

        Raises:
            ConversionError: it is another, which programs take or leave as they like.
        """
        for copy, name in self._copies().items():
            if {copy, name} <= self._names.keys():
                require_tied(self.read(WEIGHT, copy), self.read(WEIGHT, name), f"{self.path}: {copy}")


def _tensors(folder: Path, trust: bool) -> SafetensorsReader | BinReader:
    pickles = [folder / name for name in (bin_files.INDEX, bin_files.SINGLE) if (folder / name).is_file()]
    if not pickles or any((folder / name).is_file() for name in (safetensors_files.SINGLE, safetensors_files.INDEX)):
        return SafetensorsReader(folder)
    require_trust(pickles[0], trust)
    return BinReader(folder)


class HuggingFaceWriter:
    """Writes a folder that ``from_pretrained`` and serving engines take as it is.

    Args:
        extras: a folder with a tokenizer and perhaps ``generation_config.json``, or a tokenizer.json; None: none.
        eod_id: what ends the documents that the model was trained on.
    """

    kinds: tuple[str, ...] = (WEIGHT,)

    def __init__(
        self,
        folder: Path,
        model: ModelSpec,
        dtype: torch.dtype,
        shard_bytes: int,
        extras: Path | CarriedTokenizer | None,
        eod_id: int | None,
    ):
        self.folder, self.model, self.dtype = folder, model, dtype
        self.family = family_of_model(model)
        self.table = self.family.lines
        self._shard_bytes, self._extras, self._eod_id = shard_bytes, extras, eod_id
        self._config = config_from_model(model)

    def begin(self, shapes: dict[str, torch.Size]) -> None:
        """Writes all but the weights."""
        self._tensors = SafetensorsWriter(self.folder, self.dtype, shapes, self._shard_bytes)
        place = self._extras if isinstance(self._extras, Path) and self._extras.is_dir() else None
        ids = dict.fromkeys(IDS) if place is None else special_ids(place, num_tokens(self.model))
        ids["eos_token_id"] = with_end(ids["eos_token_id"], self._eod_id)
        if place is None:
            ids["bos_token_id"] = self._eod_id
        if self._extras is not None:
            write_tokenizer(self._extras, self.folder, ids)
        # with null where there is none: what is left out, transformers takes from the family
        config = self._config | ids | {"dtype": str(self.dtype).removeprefix("torch.")}
        write_json(self.folder / CONFIG, config | {"torch_dtype": config["dtype"]})
        write_generation(place, self.folder, ids, self._eod_id)

    def write(self, kind: str, name: str, tensor: Tensor) -> None:
        """The next weight."""
        self._tensors.write(name, tensor)

    def finish(self) -> None:
        """Completes the files."""
        self._tensors.finish()
