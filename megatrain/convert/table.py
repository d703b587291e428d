"""Name tables: which tensors here are which tensors elsewhere, and a model read through one."""

from collections.abc import Callable, Collection, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatrain.convert.errors import ConversionError
from megatrain.convert.forms import SAME, Form
from megatrain.convert.model_check import require_plausible
from megatrain.models.build import build_empty_model
from megatrain.spec.derive import mixture_layers
from megatrain.spec.kinds import WEIGHT
from megatrain.spec.names import bias_name
from megatrain.spec.schema import ModelSpec

VOCABULARY_NAMES = ("embedding.word.weight", "head.weight", "head.bias")


def always(model: ModelSpec) -> bool:
    """The condition of a line that every model of the family has."""
    return True


def with_attention_bias(model: ModelSpec) -> bool:
    """The condition of the attention's biases."""
    return model.attention.bias


def every_block(model: ModelSpec) -> range:
    """The blocks of a line that each of them has."""
    return range(model.num_layers)


def dense_blocks(model: ModelSpec) -> list[int]:
    """The blocks without experts."""
    return [layer for layer in range(model.num_layers) if layer not in mixture_layers(model)]


def balanced(model: ModelSpec) -> bool:
    """The condition of the routers' balance biases."""
    return model.experts.num_experts > 0 and model.router.balance_rate > 0


def untied(model: ModelSpec) -> bool:
    """The condition of a head of its own."""
    return not model.tie_embeddings


@dataclass(frozen=True)
class Line:
    """Canonical names here, names elsewhere, how the tensors are arranged, which models and which of their blocks
    have them.

    ``{}`` in a name stands for the number of a layer, ``{expert}`` for that of each expert in turn.
    """

    ours: str | tuple[str, ...]
    theirs: str | tuple[str, ...]
    form: Form = SAME
    when: Callable[[ModelSpec], bool] = always
    blocks: Callable[[ModelSpec], Container[int]] = every_block


@dataclass(frozen=True)
class Entry:
    """A line of one layer, with whole names."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    form: Form


def entries(table: tuple[Line, ...], model: ModelSpec) -> list[Entry]:
    """The table written out for ``model``, layer by layer."""
    found = []
    for layer in (None, *range(model.num_layers)):
        for line in table:
            ours, theirs = _tuple(line.ours), _tuple(line.theirs)
            here = layer is None or layer in line.blocks(model)
            if ("{}" in ours[0]) == (layer is not None) and here and line.when(model):
                found.append(Entry(_of_layer(ours, layer), _of_experts(_of_layer(theirs, layer), model), line.form))
    return found


class Reader(Protocol):
    """A model in some format on disk, read tensor by tensor under the format's own names.

    ``path``: where it lies; ``kinds``: of tensors (``weight``, perhaps moments); ``step``: updates that it has had.
    """

    path: Path
    model: ModelSpec
    table: tuple[Line, ...]
    kinds: tuple[str, ...]
    step: int

    def read(self, kind: str, name: str) -> Tensor:
        """A whole tensor on the CPU.

        Raises:
            ConversionError: it is not there or damaged.
        """
        ...

    def names(self) -> Collection[str]:
        """All that is there."""
        ...


class Writer(Protocol):
    """Writes a model in some format, tensor by tensor, in the order that was announced.

    ``dtype``: what the weights are rounded to.
    """

    table: tuple[Line, ...]
    kinds: tuple[str, ...]
    dtype: torch.dtype

    def begin(self, shapes: dict[str, torch.Size]) -> None:
        """Writes all but the tensors, whose names and shapes these will be."""
        ...

    def write(self, kind: str, name: str, tensor: Tensor) -> None:
        """The next tensor."""
        ...

    def finish(self) -> None:
        """Completes the files."""
        ...


class Weights:
    """The tensors of a reader under canonical names. Holds one line of the table at a time."""

    def __init__(self, reader: Reader):
        self.reader, self.model = reader, reader.model
        require_plausible(self.model, reader.names(), reader.path)
        self._entry_of = {name: entry for entry in entries(reader.table, reader.model) for name in entry.ours}
        self._shapes = canonical_shapes(self.model)
        self._last: tuple[tuple[str, Entry], dict[str, Tensor]] | None = None

    def read(self, kind: str, name: str) -> Tensor:
        """A tensor in the arrangement of this project, in the type that the format holds.

        Raises:
            ConversionError: it is not there, damaged or of another shape than the model's config says.
        """
        entry = self._entry_of[name]
        if self._last is None or self._last[0] != (kind, entry):
            theirs = [self.reader.read(kind, their_name) for their_name in entry.theirs]
            try:
                ours = entry.form.to_ours(theirs, self.model)
            except (RuntimeError, ValueError) as error:
                raise ConversionError(f"{', '.join(entry.theirs)} of shape {_listed(theirs)}: {error}") from error
            for own, tensor in zip(entry.ours, ours, strict=True):
                if tensor.shape != self._shapes[own]:
                    wrong = f"{tuple(tensor.shape)} here, where the config says {tuple(self._shapes[own])}"
                    raise ConversionError(f"{', '.join(entry.theirs)} of shape {_listed(theirs)}: {own} is {wrong}")
            self._last = (kind, entry), dict(zip(entry.ours, ours, strict=True))
        return self._last[1][name]

    def require_complete(self) -> None:
        """Checks that reader and table tell of the same tensors.

        Raises:
            ConversionError: names what is missing and what nobody knows.
        """
        require_lines(self.reader.table, self.model)
        there = set(self.reader.names())
        wanted = {name for entry in self._entry_of.values() for name in entry.theirs}
        problems = [f"missing: {name}" for name in sorted(wanted - there)]
        problems += [f"not known: {name}" for name in sorted(there - wanted)]
        if problems:
            more = f"\n  … and {len(problems) - 10} more" if len(problems) > 10 else ""
            listed = "\n  ".join(problems[:10])
            raise ConversionError(
                f"the tensors are not those of the model that its config describes:\n  {listed}{more}"
            )


def _listed(tensors: list[Tensor]) -> str:
    return ", ".join(str(tuple(tensor.shape)) for tensor in tensors)


def require_lines(table: tuple[Line, ...], model: ModelSpec) -> None:
    """Checks that a table has a line for each parameter of the model, none of which may get lost.

    Raises:
        ConversionError: names those that have none.
    """
    known = {name for entry in entries(table, model) for name in entry.ours}
    if lost := sorted(canonical_shapes(model).keys() - known):
        raise ConversionError(f"the format has no place for {len(lost)} of the model's parameters, like {lost[0]}")


def canonical_shapes(model: ModelSpec) -> dict[str, torch.Size]:
    """Every parameter's name and whole shape, and those of the balance biases.

    Raises:
        ConversionError: a tensor is larger than can be.
    """
    try:
        with torch.device("meta"):
            shapes = {name: parameter.shape for name, parameter in build_empty_model(model).named_parameters()}
    except RuntimeError as error:
        raise ConversionError(f"no model has these sizes: {error!s:.200}") from error
    if balanced(model):
        shapes |= {bias_name(layer): torch.Size([model.experts.num_experts]) for layer in mixture_layers(model)}
    return shapes


def adam_group(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group of torch's AdamW with some settings, as its state dict has it; its defaults for the rest."""
    (group,) = torch.optim.AdamW([torch.zeros(1)], **settings).state_dict()["param_groups"]
    return group


def kinds_of(name: str, kinds: Collection[str]) -> list[str]:
    """The members of ``kinds`` that a tensor has: balance biases have no moments."""
    return [kind for kind in kinds if kind == WEIGHT or not name.endswith("balance_bias")]


def identity(model: ModelSpec) -> tuple[Line, ...]:
    """The table of formats that use the names here."""
    return tuple(Line(name, name) for name in canonical_shapes(model))


def their_shapes(table: tuple[Line, ...], model: ModelSpec) -> Iterator[tuple[Entry, list[torch.Size]]]:
    """Each entry with the shapes of its tensors elsewhere."""
    shapes = canonical_shapes(model)
    for entry in entries(table, model):
        ours = [torch.empty(shapes[name], device="meta") for name in entry.ours]
        yield entry, [tensor.shape for tensor in entry.form.to_theirs(ours, model)]


def _of_layer(names: tuple[str, ...], layer: int | None) -> tuple[str, ...]:
    return tuple(name.replace("{}", str(layer)) for name in names)


def _of_experts(names: tuple[str, ...], model: ModelSpec) -> tuple[str, ...]:
    if "{expert}" not in names[0]:
        return names
    return tuple(name.replace("{expert}", str(e)) for name in names for e in range(model.experts.num_experts))


def _tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names
