"""Restores the training state of an engine from a checkpoint of any layout."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatrain.checkpoint.errors import CheckpointError, UnfitError
from megatrain.checkpoint.placement import Placement, place
from megatrain.checkpoint.store import CheckpointReader
from megatrain.config.schema import ModelConfig
from megatrain.engine.engine import Engine
from megatrain.engine.state import (
    WEIGHT,
    Fragment,
    factors,
    finish_import,
    kinds_of,
    local_fragments,
    prepare_import,
    set_optimizer_step_count,
)

_READERS = 3  # threads; so many fragments may be in memory beside the state itself


ResumeData = Callable[[dict[str, Any], int], None]
"""Is given what a checkpoint holds under ``data`` and its step; raises UnfitError where the data can't go on there."""


def load_checkpoint(engine: Engine, path: Path, resume_data: ResumeData) -> dict[str, Any]:
    """Restores weights, moments, update count and loss scaler; each rank reads only the chunks that it needs.

    Args:
        resume_data: called before anything is restored.
    Returns: the manifest's state (``step``, ``data``, …).
    Raises:
        UnfitError: of another model or data (all differing fields are listed).
        CheckpointError: damaged, on every rank if on any; the engine's state is then undefined.
    """
    problem: CheckpointError | None = None
    try:
        reader = CheckpointReader(path)
        require_same_model(reader, engine.config.model)
        resume_data(reader.state["data"], reader.state["step"])
        _read_state(reader, engine)
    except CheckpointError as error:
        problem = error
    problems: list[CheckpointError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for found in filter(None, problems):
        raise found
    finish_import(engine)
    set_optimizer_step_count(engine, reader.state["optimizer_steps"])
    engine.routers.load_biases(reader.state["router_biases"])
    if engine.config.precision.dtype == reader.state["dtype"]:
        engine.load_loss_scaler_state(reader.state["loss_scaler"])
    return reader.state


def require_same_model(reader: CheckpointReader, model: ModelConfig) -> None:
    """Refuses a checkpoint whose weights are another model's. Dropout and side losses do not shape the weights.

    Raises:
        UnfitError: lists every field that differs.
    """
    ignored = ("dropout", "attention_dropout", "init_std", "router_balance_loss", "router_z_loss")
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
        raise UnfitError(
            f"{reader.path} was made with another {section}:\n  {listed}\nuse the saved values, or another run folder"
        )


def _read_state(reader: CheckpointReader, engine: Engine) -> None:
    """Reads in threads, a few fragments ahead, and sets each as it comes."""
    prepare_import(engine)
    work = iter(
        (kind, fragment, place(engine, fragment.parameter))
        for fragment in local_fragments(engine)
        for kind in kinds_of(engine, fragment.parameter)
    )
    with ThreadPoolExecutor(_READERS, "checkpoint-read") as pool:
        for kind, fragment, values in _ahead(pool, work, reader):
            if values is not None:
                fragment.set(kind, values.to(engine.mesh.device))
    for key, factor in factors(engine).items():
        factor.copy_(torch.from_numpy(reader.read(*key)) if key in reader.arrays else torch.zeros(factor.shape))


def _ahead(
    pool: ThreadPoolExecutor, work: Iterator[tuple[str, Fragment, Placement]], reader: CheckpointReader
) -> Iterator[tuple[str, Fragment, Tensor | None]]:
    queue: list[tuple[str, Fragment, Future[Tensor | None]]] = []
    while True:
        for kind, fragment, where in work:
            queue.append((kind, fragment, pool.submit(_read_fragment, reader, kind, fragment, where)))
            if len(queue) >= _READERS:
                break
        if not queue:
            return
        kind, fragment, future = queue.pop(0)
        yield kind, fragment, future.result()


def _read_fragment(reader: CheckpointReader, kind: str, fragment: Fragment, where: Placement) -> Tensor | None:
    """[size] FP32, from the rows that the fragment touches; None if they were read into their place at once."""
    if kind != WEIGHT and (kind, fragment.name) not in reader.arrays:  # a converted model, or another optimizer
        return torch.zeros(fragment.size)
    row_elements = torch.Size(where.shape[1:]).numel()
    first = fragment.start // row_elements
    last = -(-(fragment.start + fragment.size) // row_elements)
    offset, shape = where.offset, where.shape
    if where.shape:
        offset = (where.offset[0] + first, *where.offset[1:])
        shape = (last - first, *where.shape[1:])
    memory = fragment.memory(kind)
    if memory is not None and fragment.size == torch.Size(shape).numel():
        reader.read(kind, fragment.name, offset, shape, out=memory.numpy().reshape(shape))
        return None
    rows = torch.from_numpy(reader.read(kind, fragment.name, offset, shape)).flatten()
    start = fragment.start - first * row_elements
    return rows[start : start + fragment.size]
