"""Writes checkpoints that DeepSpeed and its tools read: ZeRO 1 for some data-parallel ranks, and universal ones.

Names and their order are those of Hugging Face's modules, so that an engine around such a model loads them.
"""

import math
import shutil
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatrain.checkpoint.convert.deepspeed_names import module_order, names_of
from megatrain.checkpoint.convert.deepspeed_read import LATEST, UNIVERSAL_NAMES
from megatrain.checkpoint.convert.model_file import write_model
from megatrain.checkpoint.convert.table import WEIGHT
from megatrain.config.schema import ModelConfig

VERSION = "0.19.8"
"""Of DeepSpeed, whose files these are like."""
_UNIVERSAL_INFO = {"universal_checkpoint_version": 0.2}
_MANY_GROUPS = 64


class _Flat:
    """Tensors behind one another in a file that is mapped into memory: the system keeps only what it has room for."""

    def __init__(self, path: Path, num_elements: int, dtype: torch.dtype):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.tensor = torch.from_file(str(path), shared=True, size=num_elements, dtype=dtype)

    def put(self, start: int, values: Tensor) -> None:
        """Sets elements from ``start`` on; what lies outside is another part's."""
        first, last = max(start, 0), min(start + values.numel(), self.tensor.numel())
        if first < last:
            self.tensor[first:last] = values.flatten()[first - start : last - start]


class _ModelStates:
    """``mp_rank_00_model_states.pt``: the weights of the modules in the type that they are trained in."""

    def __init__(self, scratch: Path, dtype: torch.dtype, shapes: dict[str, torch.Size], num_ranks: int, step: int):
        self._shapes, self._step, self._num_ranks = shapes, step, num_ranks
        self._starts, end = {}, 0
        for name, shape in shapes.items():
            self._starts[name] = end
            end += shape.numel()
        self._flat = _Flat(scratch / "module", end, dtype)

    def put(self, name: str, tensor: Tensor) -> None:
        self._flat.put(self._starts[name], tensor)

    def save(self, folder: Path) -> None:
        module = OrderedDict(
            (name, self._flat.tensor[start : start + self._shapes[name].numel()].view(self._shapes[name]))
            for name, start in self._starts.items()
        )
        states = {
            "module": module,
            "buffer_names": [],
            "optimizer": None,
            "param_shapes": [OrderedDict(self._shapes)],
            "frozen_param_shapes": None,
            "shared_params": {},
            "frozen_param_fragments": None,
            "lr_scheduler": None,
            "data_sampler": None,
            "random_ltd": None,
            "skipped_steps": 0,
            "global_steps": self._step,
            "global_samples": 0,
            "dp_world_size": self._num_ranks,
            "mp_world_size": 1,
            "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
            "universal_checkpoint_info": _UNIVERSAL_INFO,
            "iteration": self._step,
            "ds_config": {},
            "ds_version": VERSION,
        }
        torch.save(states, folder / "mp_rank_00_model_states.pt")


class _DeepSpeedWriter:
    """What both kinds share: where the files go, and the modules' names in their order."""

    kinds: tuple[str, ...] = tuple(UNIVERSAL_NAMES)
    dtype = torch.float32

    def __init__(self, root: Path, model: ModelConfig, step: int, tag: str):
        self.root, self.model, self.step, self.tag = root, model, step, tag
        self.folder, self._scratch = root / tag, root / tag / "scratch"
        self._order = module_order(model)
        self.table = names_of(model, self._order)

    def _begin(self, shapes: dict[str, torch.Size], num_ranks: int, latest: str) -> dict[str, torch.Size]:
        self.folder.mkdir(parents=True)
        (self.root / latest).write_text(self.tag, encoding="utf-8")
        write_model(self.root, self.model)
        shapes = {name: shapes[name] for name in self._order}
        self._module = _ModelStates(self._scratch, self.dtype, shapes, num_ranks, self.step)
        return shapes

    def _finish(self) -> None:
        self._module.save(self.folder)
        shutil.rmtree(self._scratch)


class ZeroWriter(_DeepSpeedWriter):
    """Writes ``root/global_step…`` as ZeRO 1 on ``num_ranks`` data-parallel ranks saves it, in one parameter group.

    Moments that the source does not have are zero.
    """

    def __init__(self, root: Path, model: ModelConfig, step: int, num_ranks: int):
        super().__init__(root, model, step, f"global_step{step}")
        self._num_ranks = num_ranks

    def begin(self, shapes: dict[str, torch.Size]) -> None:
        """Makes room for the flat partitions."""
        shapes = self._begin(shapes, self._num_ranks, LATEST)
        self._slices, end = OrderedDict[str, tuple[int, int]](), 0
        for name, shape in shapes.items():
            self._slices[name] = (end, end + shape.numel())
            end += shape.numel()
        # DeepSpeed makes partitions of even length and saves the last one's weights, not its moments, without padding
        self._size = math.ceil(end / (2 * self._num_ranks)) * 2
        self._lengths = [max(0, min(self._size, end - rank * self._size)) for rank in range(self._num_ranks)]
        self._flats = {
            (kind, rank): _Flat(
                self._scratch / f"{kind}.{rank}", length if kind == WEIGHT else self._size, torch.float32
            )
            for kind in self.kinds
            for rank, length in enumerate(self._lengths)
        }

    def write(self, kind: str, name: str, tensor: Tensor) -> None:
        """Puts a tensor into the partitions that it touches."""
        start, _ = self._slices[name]
        for rank in range(self._num_ranks):
            self._flats[kind, rank].put(start - rank * self._size, tensor.float())
        if kind == WEIGHT:
            self._module.put(name, tensor.float())

    def finish(self) -> None:
        """Saves the ranks' files."""
        for rank in range(self._num_ranks):
            torch.save(
                {"optimizer_state_dict": self._optimizer_states(rank), "ds_config": {}, "ds_version": VERSION},
                self.folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
            )
        self._finish()

    def _optimizer_states(self, rank: int) -> dict[str, Any]:
        state = {kind: self._flats[kind, rank].tensor for kind in self.kinds if kind != WEIGHT}
        groups = torch.optim.AdamW([torch.zeros(1)]).state_dict()["param_groups"]
        return {
            "base_optimizer_state": {
                "state": {0: {"step": torch.tensor(float(self.step)), **state}},
                "param_groups": groups,
            },
            "single_partition_of_fp32_groups": [self._flats[WEIGHT, rank].tensor],
            "zero_stage": 1,
            "overflow": False,
            "group_paddings": [self._size - self._lengths[rank]],
            "param_alignment_paddings": [[0] * len(self._slices)],
            "partition_count": [self._num_ranks],
            "param_slice_mappings": [self._fragments(rank)],
            "ds_version": VERSION,
        }

    def _fragments(self, rank: int) -> OrderedDict[str, SimpleNamespace]:
        """Where the parts of parameters stand in a rank's partition."""
        found = OrderedDict()
        begin, end = rank * self._size, rank * self._size + self._lengths[rank]
        for name, (start, stop) in self._slices.items():
            first, last = max(start, begin), min(stop, end)
            if first < last:
                found[name] = SimpleNamespace(numel=last - first, start=first - begin)
        return found


class UniversalWriter(_DeepSpeedWriter):
    """Writes ``root/global_step…_universal``, which an engine of any layout loads with ``load_universal``."""

    def __init__(self, root: Path, model: ModelConfig, step: int):
        super().__init__(root, model, step, f"global_step{step}_universal")

    def begin(self, shapes: dict[str, torch.Size]) -> None:
        """Makes the folders."""
        self._begin(shapes, 1, f"{LATEST}_universal")

    def write(self, kind: str, name: str, tensor: Tensor) -> None:
        """One file for each tensor, and the step beside it."""
        place = self.folder / "zero" / name
        place.mkdir(parents=True, exist_ok=True)
        whole = tensor.float().clone(memory_format=torch.contiguous_format)
        torch.save({"param": whole, "cat_dim": 0}, place / f"{UNIVERSAL_NAMES[kind]}.pt")
        if kind == WEIGHT:
            torch.save(torch.tensor(float(self.step)), place / "step.pt")
            self._module.put(name, whole)

    def finish(self) -> None:
        """Saves what does not belong to one parameter."""
        # settings of the groups stay as the engine has them; it stops at the end of the shorter list of groups
        states = {"param_groups": [{} for _ in range(_MANY_GROUPS)], "zero_stage": 1, "ds_version": VERSION}
        torch.save(states, self.folder / "zero" / "optimizer_state.pt")
        self._finish()
