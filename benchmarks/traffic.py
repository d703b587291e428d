"""Counts what one rank sends: every collective and point-to-point message, at torch's own operators.

Torch's ways to communicate (plain, asynchronous, batched, functional; also what DeepSpeed and megatron-core call) pass
through methods of its process groups or its functional module, and end in operators of the ``c10d`` namespaces. The
methods are wrapped, on the class, and within each call a dispatch mode reads the operator: group, kind and tensors. (A
mode over the whole step would see the same, but some tensors of torch's own cannot be made under one. What C++ sends by
itself, as DDP's reducer does without a hook, is not seen.) Bytes are those that a rank sends with a bandwidth-optimal
algorithm (Chan et al. 2007, table 2; NCCL's "bus" bytes). n bytes, p ranks:

- all-reduce: 2 n (p - 1) / p
- all-gather (n: the gathered), reduce-scatter (n: the input): n (p - 1) / p
- broadcast, reduce, gather, scatter: n (p - 1) / p, the mean over the ranks
- all-to-all: what goes to other ranks, exactly; send: n (counted at the sender)

Worlds of ranks that nobody starts use torch's fake process group. There every other rank is an echo: it sends what it
got, so that values stay finite and each received count fits.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional
from torch.utils._python_dispatch import TorchDispatchMode

_COUNTED = {
    "allreduce_": ("all_reduce", "tensors"),
    "allreduce_coalesced_": ("all_reduce", "tensors"),
    "_allgather_base_": ("all_gather", "output_tensor"),
    "allgather_": ("all_gather", "output_tensors"),
    "allgather_coalesced_": ("all_gather", "output_lists"),
    "allgather_into_tensor_coalesced_": ("all_gather", "outputs"),
    "_reduce_scatter_base_": ("reduce_scatter", "input_tensor"),
    "reduce_scatter_": ("reduce_scatter", "input_tensors"),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", "inputs"),
    "alltoall_base_": ("all_to_all", "input"),
    "alltoall_": ("all_to_all", "input_tensors"),
    "broadcast_": ("broadcast", "tensors"),
    "reduce_": ("reduce", "tensors"),
    "gather_": ("gather", "output_tensors"),
    "scatter_": ("scatter", "input_tensors"),
    "send": ("send", "tensors"),
    "all_reduce": ("all_reduce", "input"),
    "all_reduce_": ("all_reduce", "input"),
    "all_gather_into_tensor": ("all_gather", "result"),
    "reduce_scatter_tensor": ("reduce_scatter", "input"),
    "all_to_all_single": ("all_to_all", "input"),
    "broadcast": ("broadcast", "input"),
}
"""Operator -> kind, and the argument that holds its n bytes."""
_COMMUNICATES = re.compile(r"_?(all_?|reduce|broadcast|gather|scatter|send|recv|barrier|monitored_barrier|permute)")
_LOCAL = {"wait_tensor", "_wrap_tensor_autograd"}
_SILENT = {"recv_", "recv_any_source_", "barrier", "monitored_barrier_"}


class Traffic:
    """``with Traffic(names) as traffic:`` counts this rank's ``calls`` and sent ``bytes`` by (group, kind).

    Args:
        names: of the groups, by torch's ``group_name``; the others are called after their size.

    Raises:
        NotImplementedError: at an operator of ``c10d`` that it does not know: nothing crosses uncounted.
    """

    def __init__(self, names: dict[str, str] | None = None):
        self.names = names or {}
        self.calls: Counter[tuple[str, str]] = Counter()
        self.bytes: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._patches = ExitStack()

    def __enter__(self) -> Self:
        reader = _OperatorReader(self.count)
        for place in (dist.ProcessGroup, functional):
            for name in vars(place):
                if _COMMUNICATES.match(name) and callable(getattr(place, name)):
                    self._patches.enter_context(mock.patch.object(place, name, _under(reader, getattr(place, name))))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    @property
    def sent(self) -> float:
        """Bytes of all kinds over all groups."""
        return sum(self.bytes.values())

    def of(self, *kinds: str) -> float:
        """Bytes of some kinds."""
        return sum(count for (_, kind), count in self.bytes.items() if kind in kinds)

    def count(self, operator: str, values: dict[str, Any]) -> None:
        """Takes in one call of an operator, given its arguments by name."""
        if operator in _LOCAL:
            return
        group = _group_of(values)
        if dist.get_backend(group) == "fake":
            _echo(values, dist.get_rank(group))
        if operator in _SILENT:
            return
        if operator not in _COUNTED:
            raise NotImplementedError(f"{operator} is not counted")
        kind, argument = _COUNTED[operator]
        size = group.size()
        key = self.names.get(group.group_name, f"{size} ranks"), kind
        self.calls[key] += 1
        self.bytes[key] += _sent(kind, values, _num_bytes(values[argument]), size, dist.get_rank(group))


class _OperatorReader(TorchDispatchMode):
    def __init__(self, count: Callable[[str, dict[str, Any]], None]):
        super().__init__()
        self._report = count
        self.reading = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            values = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
            self._report(func._schema.name.split("::")[1], {**values, **(kwargs or {}), "result": result})
        return result


def _under(reader: _OperatorReader, call: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if reader.reading:  # one method calls another: what is below is read once
            return call(*args, **kwargs)
        reader.reading = True
        try:
            with reader:
                return call(*args, **kwargs)
        finally:
            reader.reading = False

    return wrapped


def _sent(kind: str, values: dict[str, Any], num_bytes: int, size: int, rank: int) -> float:
    if kind == "send":
        return num_bytes
    splits = values.get("input_split_sizes")
    if kind == "all_to_all" and splits:
        return num_bytes * (1 - splits[rank] / max(1, sum(splits)))
    return num_bytes * (size - 1) / size * (2 if kind == "all_reduce" else 1)


def _group_of(values: dict[str, Any]) -> dist.ProcessGroup:
    if "process_group" in values:
        return dist.ProcessGroup.unbox(values["process_group"])
    name = values["group_name"]
    return name if isinstance(name, dist.ProcessGroup) else dist.distributed_c10d._resolve_process_group(name)


def _num_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_num_bytes, value)) if isinstance(value, (list, tuple)) else 0


def _echo(values: dict[str, Any], rank: int) -> None:
    """Writes what a rank receives whose peers send what it sends."""
    with torch.no_grad():
        match values:
            case {"output_tensor": output, "input_tensor": x} if output.numel() > x.numel():  # all-gather
                output.view(-1, x.numel()).copy_(x.reshape(1, -1).clone())  # x may be a part of it
            case {"output_tensor": output, "input_tensor": x}:  # reduce-scatter
                output.view(-1).copy_(x.reshape(-1, output.numel())[rank].clone())
            case {"output": output, "input": x}:  # all-to-all
                output.copy_(x) if output.numel() == x.numel() else output.zero_()
            case {"output_tensors": [list() as outputs], "input_tensors": [x]}:
                for output in outputs:
                    output.copy_(x)
            case {"tensors": tensors, "src": _}:
                for tensor in tensors:
                    tensor.zero_()


def start_fake_world(size: int, rank: int = 0) -> None:
    """Makes this process rank ``rank`` of ``size``, of which no other runs; ends the world that it was in."""
    from torch.distributed.pipelining import PipelineStage
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatrain.engine.zero.import_once import import_deepspeed

    deepspeed = import_deepspeed()
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    from deepspeed.utils import groups

    for name, value in vars(groups).items():  # of the world before
        if name.startswith("_") and name.isupper():
            setattr(groups, name, {} if isinstance(value, dict) else None)
    deepspeed.comm.comm.cdb = None
    deepspeed.init_distributed(dist_backend="fake", auto_mpi_discovery=False, verbose=False)
    if hasattr(PipelineStage, "_recv_meta"):  # a neighbour's shapes, which torch asks for before the first step
        PipelineStage._recv_meta = _own_shapes  # type: ignore[method-assign,assignment]


def _own_shapes(stage: Any, neighbour: int) -> Any:
    """Stages give out what they take: activations [S, B, D]."""
    from torch.distributed.pipelining import stage as pipelining

    forward = stage._stage_meta.outputs
    return pipelining._StageBackwardMeta(backward_metas=pipelining._derive_grad_metas(forward))
