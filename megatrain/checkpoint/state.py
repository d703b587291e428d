"""What a checkpoint says beside its tensors, checked before anything is built by it: whoever wrote it."""

from typing import Any

import torch
from pydantic import ValidationError

from megatrain.checkpoint.store.arrays import CheckpointReader
from megatrain.checkpoint.store.errors import CheckpointError, UnfitError
from megatrain.models.build import build_empty_model
from megatrain.spec.derive import resolve_model
from megatrain.spec.keys import flat
from megatrain.spec.kinds import WEIGHT
from megatrain.spec.older import of_this_version
from megatrain.spec.schema import ModelConfig, ModelSpec

_TYPES: dict[str, tuple[type, ...]] = {
    "step": (int,),
    "optimizer_steps": (int,),
    "tokens": (int,),
    "dtype": (str,),
    "loss_scaler": (dict,),
    "router_biases": (dict,),
    "model": (dict,),
    "data": (dict,),
}
_LISTED = 5  # mistakes of one message


def require_state(reader: CheckpointReader, *fields: str) -> dict[str, Any]:
    """The state of a checkpoint, in which ``fields`` (by default all that a run goes on from) are of their types.

    Raises:
        CheckpointError: names those that are missing or of another type.
    """
    state = reader.state
    problems = [
        f"{field} is missing" if field not in state else f"{field} is {state[field]!r:.60}"
        for field in fields or _TYPES
        if type(state.get(field)) not in _TYPES[field]
    ]
    biases = state.get("router_biases")
    if not problems and (not fields or "router_biases" in fields) and isinstance(biases, dict):
        lists = all(isinstance(row, list) and all(type(x) in (int, float) for x in row) for row in biases.values())
        problems = [] if lists else ["router_biases are not lists of numbers"]
    if problems:
        raise CheckpointError(f"the state in {reader.path} is not one to go on from: {'; '.join(problems)}")
    return state


def saved_model(reader: CheckpointReader) -> ModelSpec:
    """The resolved model of a checkpoint, of which every weight is there in its shape.

    Raises:
        UnfitError: a newer version saved it, with fields that are not known here.
        CheckpointError: there is none, it is not valid, or the tensors are another model's.
    """
    saved = require_state(reader, "model")["model"]
    if type(count := saved.get("num_layers", 1)) is int and count > len(reader.arrays):  # a layer has one at least
        raise CheckpointError(f"{reader.path} holds {len(reader.arrays)} arrays, too few for num_layers {count:.0f}")
    try:
        model = described_model(reader)
        with torch.device("meta"):
            wanted = {name: tuple(weight.shape) for name, weight in build_empty_model(model).named_parameters()}
    except (RuntimeError, ValueError, TypeError, ArithmeticError, MemoryError) as error:
        raise CheckpointError(f"no model can be made as {reader.path} says: {error!s:.200}") from error
    _require_shapes(reader, wanted)
    return model


def described_model(reader: CheckpointReader) -> ModelSpec:
    """The resolved model that a checkpoint's state names, of this version or an older one.

    Raises:
        UnfitError: a newer version saved it, with fields that are not known here.
        CheckpointError: there is none, or it is not valid.
    """
    saved = of_this_version(require_state(reader, "model")["model"])
    if unknown := sorted(_unknown_fields(saved)):
        listed = ", ".join(f"model.{field:.60}" for field in unknown[:_LISTED])
        version = reader.versions.get("megatrain", "another version")
        raise UnfitError(
            f"{reader.path} was saved by megatrain {version:.60}, whose models have fields that are not known here: "
            f"{listed}. Update megatrain"
        )
    try:
        return resolve_model(ModelConfig.model_validate(saved))
    except ValidationError as error:
        told = [f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}" for entry in error.errors()[:_LISTED]]
        raise CheckpointError(f"the model in {reader.path} is not valid: {'; '.join(told)}") from error


def _unknown_fields(saved: dict[str, Any]) -> set[str]:
    known = ModelConfig().model_dump()
    return {key for key in flat(saved) if key not in flat(known) and key not in known}


def _require_shapes(reader: CheckpointReader, wanted: dict[str, tuple[int, ...]]) -> None:
    there = {name: spec.shape for (kind, name), spec in reader.arrays.items() if kind == WEIGHT}
    problems = [
        f"{name} is {list(there[name]) if name in there else 'missing'} instead of {list(shape)}"
        for name, shape in wanted.items()
        if there.get(name) != shape
    ]
    problems += [f"{name} is not known" for name in there if name not in wanted]
    if problems:
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise CheckpointError(
            f"the weights in {reader.path} are not those of its model: {'; '.join(problems[:_LISTED])}{more}"
        )
