"""Writes checkpoints that DeepSpeed and its tools read: ZeRO 1 for some data-parallel ranks, and universal ones.

Names and their order are those of Hugging Face's modules, so that an engine around such a model loads them.
"""

import math
import shutil
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatrain.convert.deepspeed.names import AutoTPSplit, module_order, names_of
from megatrain.convert.deepspeed.read import LATEST, UNIVERSAL_NAMES
from megatrain.convert.errors import ConversionError
from megatrain.convert.model_file import write_model
from megatrain.convert.table import adam_group
from megatrain.spec.kinds import WEIGHT
from megatrain.spec.schema import ModelSpec

VERSION = "0.19.8"
"""Of DeepSpeed, whose files these are like."""
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
    """``mp_rank_…_model_states.pt``: the weights of one tensor rank's modules in the type that they are trained in."""

    def __init__(self, scratch: Path, shapes: dict[str, torch.Size], split: AutoTPSplit, rank: int, data_ranks: int):
        self._shapes, self._split, self._rank, self._data_ranks = shapes, split, rank, data_ranks
        self._starts, end = {}, 0
        for name, shape in shapes.items():
            self._starts[name] = end
            end += shape.numel()
        self._flat = _Flat(scratch / f"module.{rank}", end, torch.float32)

    def put(self, name: str, tensor: Tensor) -> None:
        self._flat.put(self._starts[name], tensor)

    def save(self, folder: Path, step: int) -> None:
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
            "global_steps": step,
            "global_samples": 0,
            "dp_world_size": self._data_ranks,
            "mp_world_size": self._split.num_ranks,
            "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": self._split.num_ranks},
            "universal_checkpoint_info": self._split.universal_info(),
            "iteration": step,
            "ds_config": {},
            "ds_version": VERSION,
        }
        torch.save(states, folder / f"mp_rank_{self._rank:02d}_model_states.pt")


class _Partitions:
    """What one tensor rank's data-parallel ranks hold under ZeRO 1: its tensors behind one another, cut evenly."""

    def __init__(
        self, scratch: Path, shapes: dict[str, torch.Size], rank: int, data_ranks: int, adam: Mapping[str, Any]
    ):
        self._rank, self._data_ranks, self._adam = rank, data_ranks, adam
        self._slices, end = OrderedDict[str, tuple[int, int]](), 0
        for name, shape in shapes.items():
            self._slices[name] = (end, end + shape.numel())
            end += shape.numel()
        # DeepSpeed makes partitions of even length and saves the last one's weights, not its moments, without padding
        self._size = math.ceil(end / (2 * data_ranks)) * 2
        if (data_ranks - 1) * self._size >= end:
            raise ConversionError(f"--zero-ranks {data_ranks}: {end} weights leave some of them without any")
        self._lengths = [max(0, min(self._size, end - part * self._size)) for part in range(data_ranks)]
        self._flats = {
            (kind, part): _Flat(
                scratch / f"{kind}.{rank}.{part}", length if kind == WEIGHT else self._size, torch.float32
            )
            for kind in UNIVERSAL_NAMES
            for part, length in enumerate(self._lengths)
        }

    def put(self, kind: str, name: str, tensor: Tensor) -> None:
        """Puts a tensor into the partitions that it touches."""
        start, _ = self._slices[name]
        for part in range(self._data_ranks):
            self._flats[kind, part].put(start - part * self._size, tensor)

    def save(self, folder: Path, step: int) -> None:
        for part in range(self._data_ranks):
            torch.save(
                {"optimizer_state_dict": self._optimizer_states(part, step), "ds_config": {}, "ds_version": VERSION},
                folder / f"zero_pp_rank_{part}_mp_rank_{self._rank:02d}_optim_states.pt",
            )

    def _optimizer_states(self, part: int, step: int) -> dict[str, Any]:
        state = {kind: self._flats[kind, part].tensor for kind in UNIVERSAL_NAMES if kind != WEIGHT}
        return {
            "base_optimizer_state": {
                "state": {0: {"step": torch.tensor(float(step)), **state}},
                "param_groups": [adam_group(self._adam)],
            },
            "single_partition_of_fp32_groups": [self._flats[WEIGHT, part].tensor],
            "zero_stage": 1,
            "overflow": False,
            "group_paddings": [self._size - self._lengths[part]],
            "param_alignment_paddings": [[0] * len(self._slices)],
            "partition_count": [self._data_ranks],
            "param_slice_mappings": [self._fragments(part)],
            "ds_version": VERSION,
        }

    def _fragments(self, part: int) -> OrderedDict[str, SimpleNamespace]:
        """Where the pieces of parameters stand in a partition."""
        found = OrderedDict()
        begin, end = part * self._size, part * self._size + self._lengths[part]
        for name, (start, stop) in self._slices.items():
            first, last = max(start, begin), min(stop, end)
            if first < last:
                found[name] = SimpleNamespace(numel=last - first, start=first - begin)
        return found


class _DeepSpeedWriter:
    """What both kinds share: where the files go, and the modules' names in their order."""

    kinds: tuple[str, ...] = tuple(UNIVERSAL_NAMES)
    dtype = torch.float32

    def __init__(self, root: Path, model: ModelSpec, step: int, tag: str, tensor_ranks: int = 1):
        self.root, self.model, self.step, self.tag = root, model, step, tag
        self.folder, self._scratch = root / tag, root / tag / "scratch"
        self._order = module_order(model)
        self.table = names_of(model, self._order)
        self._split = AutoTPSplit(model, self._order, tensor_ranks)

    def _begin(self, shapes: dict[str, torch.Size], data_ranks: int, latest: str) -> list[dict[str, torch.Size]]:
        """Returns the shapes of each tensor rank, in the modules' order."""
        self.folder.mkdir(parents=True)
        (self.root / latest).write_text(self.tag, encoding="utf-8")
        write_model(self.root, self.model)
        local = [{name: self._split.shape(name, shapes[name]) for name in self._order}] * self._split.num_ranks
        self._modules = [
            _ModelStates(self._scratch, shapes, self._split, rank, data_ranks) for rank, shapes in enumerate(local)
        ]
        return local

    def _finish(self) -> None:
        for module in self._modules:
            module.save(self.folder, self.step)
        shutil.rmtree(self._scratch)


class ZeroWriter(_DeepSpeedWriter):
    """Writes ``root/global_step…`` as ZeRO 1 on ``data_ranks`` data-parallel ranks of each of some tensor ranks saves
    it, in one parameter group.

    Moments that the source does not have are zero.

    Args:
        adam: arguments of the run's AdamW; its defaults for the rest.
    """

    def __init__(
        self, root: Path, model: ModelSpec, step: int, data_ranks: int, tensor_ranks: int, adam: Mapping[str, Any]
    ):
        super().__init__(root, model, step, f"global_step{step}", tensor_ranks)
        self._data_ranks, self._adam = data_ranks, adam

    def begin(self, shapes: dict[str, torch.Size]) -> None:
        """Makes room for the flat partitions."""
        local = self._begin(shapes, self._data_ranks, LATEST)
        self._partitions = [
            _Partitions(self._scratch, shapes, rank, self._data_ranks, self._adam) for rank, shapes in enumerate(local)
        ]

    def write(self, kind: str, name: str, tensor: Tensor) -> None:
        """Puts each rank's part of a tensor into its partitions."""
        for rank, part in enumerate(self._split.parts(name, tensor.float())):
            self._partitions[rank].put(kind, name, part)
            if kind == WEIGHT:
                self._modules[rank].put(name, part)

    def finish(self) -> None:
        """Saves the ranks' files."""
        for partitions in self._partitions:
            partitions.save(self.folder, self.step)
        self._finish()


class UniversalWriter(_DeepSpeedWriter):
    """Writes ``root/global_step…_universal``, which an engine of any layout loads with ``load_universal``."""

    def __init__(self, root: Path, model: ModelSpec, step: int):
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
            self._modules[0].put(name, whole)

    def finish(self) -> None:
        """Saves what does not belong to one parameter."""
        # settings of the groups stay as the engine has them; it stops at the end of the shorter list of groups
        states = {"param_groups": [{} for _ in range(_MANY_GROUPS)], "zero_stage": 1, "ds_version": VERSION}
        torch.save(states, self.folder / "zero" / "optimizer_state.pt")
        self._finish()
