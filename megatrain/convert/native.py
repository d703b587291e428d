"""This project's own checkpoints as one of the formats."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatrain.checkpoint.state import require_state, saved_model
from megatrain.checkpoint.store.arrays import CheckpointReader, CheckpointWriter
from megatrain.checkpoint.store.errors import CheckpointError
from megatrain.checkpoint.store.tokenizer_file import CarriedTokenizer, tokenizer_of
from megatrain.convert.errors import ConversionError
from megatrain.convert.model_file import write_model
from megatrain.convert.table import balanced, identity
from megatrain.spec.kinds import MOMENTS, WEIGHT
from megatrain.spec.schema import ModelSpec

RUN_ID = "conversion"


class NativeReader:
    """A checkpoint folder ``step-…``; ``adam``: the arguments of the run's AdamW, none where no run made it.

    ``tokenizer``: that it carries; ``digests``: SHA-256 of those that its data were written with.

    Raises:
        CheckpointError: it is not there or damaged.
        ConversionError: it has balance biases, and a model that says it has none.
    """

    def __init__(self, path: Path):
        self.path, self._reader = path, CheckpointReader(path)
        self._reader.require_files()  # before memory is taken
        self.model = saved_model(self._reader)
        self.table = identity(self.model)
        arrays = self._reader.arrays
        states = all((kind, name) in arrays for weight, name in arrays if weight == WEIGHT for kind in MOMENTS)
        self.kinds: tuple[str, ...] = (WEIGHT, *MOMENTS) if states else (WEIGHT,)  # other formats know AdamW's alone
        self.step = self._reader.step
        self.adam = _adam_settings(self._reader.state)
        self.tokenizer = tokenizer_of(self._reader)
        told = self._reader.state.get("tokenizers")
        self.digests = {one for one in told.values() if one} if isinstance(told, dict) else set[str]()
        self._biases: dict[str, list[float]] = require_state(self._reader, "router_biases")["router_biases"]
        if self._biases and not balanced(self.model):
            raise ConversionError(
                f"{path} holds balance biases, but its model.router.balance_rate is 0, which stands for none: resume "
                "the run with a rate above 0, however small, save once, and convert that checkpoint"
            )

    def read(self, kind: str, name: str) -> Tensor:
        """A tensor, FP32."""
        if name in self._biases:
            return torch.tensor(self._biases[name])
        try:
            return torch.from_numpy(self._reader.read(kind, name))
        except CheckpointError as error:
            raise ConversionError(str(error)) from error

    def names(self) -> Collection[str]:
        """Names of the weights."""
        return [*(name for kind, name in self._reader.arrays if kind == WEIGHT), *self._biases]


class NativeWriter:
    """Writes ``folder/step-…``, from which ``checkpoint.load`` starts a run, whatever its layout.

    Args:
        step: the optimizer step that the weights have.
        tokenizer: goes into the checkpoint.
    """

    dtype = torch.float32
    kinds: tuple[str, ...] = (WEIGHT, *MOMENTS)

    def __init__(self, folder: Path, model: ModelSpec, step: int, tokenizer: CarriedTokenizer | None = None):
        self.model, self.table, self._tokenizer = model, identity(model), tokenizer
        self._writer = CheckpointWriter(folder, step, RUN_ID)
        self._biases: dict[str, list[float]] = {}

    def begin(self, shapes: dict[str, torch.Size]) -> None:
        """Makes room, and writes the model's part of a config that goes on from the checkpoint."""
        self._writer.prepare()
        write_model(self._writer.folder, self.model)

    def write(self, kind: str, name: str, tensor: Tensor) -> None:
        """A tensor, whole; balance biases are kept with the other small states."""
        if name.endswith("balance_bias"):
            self._biases[name] = tensor.float().tolist()
            return
        part = tensor.float().contiguous().numpy()
        self._writer.write(kind, name, part, offset=(0,) * part.ndim, full_shape=part.shape)

    def finish(self) -> None:
        """Commits the checkpoint."""
        step = self._writer.step
        state = {
            "step": step,
            "optimizer_steps": step,
            "dtype": "fp32",
            "loss_scaler": {},
            "router_biases": self._biases,
            "seeds": {},
            "data": {},
            "tokens": 0,
            "model": self.model.model_dump(mode="json"),
        }
        if self._tokenizer is not None:
            self._tokenizer.write(self._writer.partial)
            state["tokenizer"] = self._tokenizer.state()
        self._writer.commit(self._writer.records(), state, {"torch": torch.__version__})


def _adam_settings(state: dict[str, Any]) -> dict[str, Any]:
    if "config" not in state:
        return {}
    try:
        optimizer = state["config"]["optimizer"]
        if optimizer["name"] not in ("adamw", "cpu_adamw"):
            return {}
        betas = (optimizer["beta1"], optimizer["beta2"])
        return {"betas": betas} | {name: optimizer[name] for name in ("lr", "eps", "weight_decay")}
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"the config in the checkpoint's state is not one of ours: {error!r:.100}") from error
