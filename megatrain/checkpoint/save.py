"""Saves and restores the training state of an engine, whatever its layout."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatrain.checkpoint.errors import CheckpointError
from megatrain.checkpoint.store import CheckpointReader, CheckpointWriter
from megatrain.config.schema import ModelConfig
from megatrain.engine.engine import Engine
from megatrain.engine.state import export_state, import_state, optimizer_step_count, set_optimizer_step_count
from megatrain.parallel.layers import partition_dim, whole_shape


def save_checkpoint(engine: Engine, folder: Path, step: int, run_id: str, data_state: dict[str, Any]) -> Path:
    """Writes ``folder/step-…``. Collective; each tensor is written once, by ranks that take turns.

    Args:
        data_state: what identifies the data set and the place in it.
    Raises:
        CheckpointError: on every rank, when any rank could not write; older checkpoints are untouched.
    """
    writer = CheckpointWriter(folder, step, run_id)
    if engine.mesh.rank == 0:
        _together(engine, writer.prepare)
    else:
        _together(engine, None)
    problem = _write_own_parts(engine, writer)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (problem, writer.records()))
    problems = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(gathered) if text]
    if problems:
        if engine.mesh.rank == 0:
            writer.discard()
        raise CheckpointError(f"checkpoint of step {step} not saved: " + "; ".join(problems))
    records = [record for _, rank_records in gathered for record in rank_records]
    state = _scalars(engine, step, data_state)
    versions = {"torch": torch.__version__}
    _together(engine, (lambda: writer.commit(records, state, versions)) if engine.mesh.rank == 0 else None)
    return folder / f"step-{step:08d}"


def load_checkpoint(engine: Engine, path: Path, data_state: dict[str, Any]) -> dict[str, Any]:
    """Restores weights, moments, update count and loss scaler; reads only this rank's parts.

    Args:
        data_state: as given to ``save_checkpoint``; another one would silently change the order of the samples.
    Returns: the manifest's state (``step``, ``data``, …).
    Raises:
        CheckpointError: damaged, or of another model or data (all differing fields are listed).
    """
    reader = CheckpointReader(path)
    require_same_model(reader, engine.config.model)
    _require_equal(reader, "data", reader.state["data"], data_state)
    import_state(engine, lambda kind, name, parameter: _read_part(reader, engine, kind, name, parameter))
    set_optimizer_step_count(engine, reader.state["optimizer_steps"])
    if engine.config.precision.dtype == reader.state["dtype"]:
        engine.load_loss_scaler_state(reader.state["loss_scaler"])
    return reader.state


def require_same_model(reader: CheckpointReader, model: ModelConfig) -> None:
    """Refuses a checkpoint whose weights are another model's. Dropout does not shape the weights.

    Raises:
        CheckpointError: lists every field that differs.
    """
    ignored = ("dropout", "attention_dropout", "init_std")
    wanted = {field: value for field, value in model.model_dump(mode="json").items() if field not in ignored}
    _require_equal(reader, "model", reader.state["model"], wanted)


def _require_equal(reader: CheckpointReader, section: str, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    different = [
        f"{section}.{field}: {saved.get(field)!r} saved, {value!r} asked"
        for field, value in wanted.items()
        if saved.get(field) != value
    ]
    if different:
        listed = "\n  ".join(different)
        raise CheckpointError(
            f"{reader.path} was made with another {section}:\n  {listed}\nuse the saved values, or another run folder"
        )


def _write_own_parts(engine: Engine, writer: CheckpointWriter) -> str | None:
    """Writes this rank's share. A failure is told later: the export is collective and must run to its end."""
    problem = None
    mesh, parameters = engine.mesh, dict(engine.parameters)
    for number, (kind, name, tensor) in enumerate(export_state(engine)):
        dim = partition_dim(parameters[name])
        replica = dim is None and mesh.coordinate("tp") > 0
        copy = getattr(parameters[name], "ds_pipe_replicated", False)
        if problem or replica or copy or number % mesh.topology.data_size != dist.get_rank(mesh.data_group):
            continue
        offset, shape = _place(engine, parameters[name], tensor.shape)
        try:
            writer.write(kind, name, tensor.numpy(), offset=offset, full_shape=shape)
        except CheckpointError as error:
            problem = str(error)
    return problem


def _place(engine: Engine, parameter: nn.Parameter, local: torch.Size) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offset of this rank's part in the whole tensor, and the whole shape."""
    dim, tp_rank = partition_dim(parameter), engine.mesh.coordinate("tp")
    offset = tuple(size * tp_rank if i == dim else 0 for i, size in enumerate(local))
    return offset, whole_shape(parameter, local, engine.mesh.topology.tp)


def _read_part(reader: CheckpointReader, engine: Engine, kind: str, name: str, parameter: nn.Parameter) -> Tensor:
    local = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO 3 empties the parameter itself
    offset, _ = _place(engine, parameter, local)
    return torch.from_numpy(reader.read(kind, name, offset, tuple(local)))


def _scalars(engine: Engine, step: int, data_state: dict[str, Any]) -> dict[str, Any]:
    return {
        "step": step,
        "optimizer_steps": optimizer_step_count(engine),
        "dtype": engine.config.precision.dtype,
        "loss_scaler": engine.loss_scaler_state(),
        # sample order and dropout are functions of these and the step: there is no generator to save
        "seeds": {"train": engine.config.train.seed, "data": engine.config.data.seed},
        "data": data_state,
        "model": engine.config.model.model_dump(mode="json"),
    }


def _together(engine: Engine, action: Any) -> None:
    """Rank 0 acts; all learn whether it went well."""
    outcome: list[Any] = [None]
    if action is not None:
        try:
            action()
        except CheckpointError as error:
            outcome = [str(error)]
    dist.broadcast_object_list(outcome, src=0)
    if outcome[0]:
        raise CheckpointError(outcome[0])
