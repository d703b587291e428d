"""Activation checkpointing: what a block keeps from its forward for its backward pass, and where.

Chen et al. 2016 (whole blocks), Korthikanti et al. 2022 (attention cores). Nothing here draws random numbers
from a generator (dropout is a function of the sample), so no generator state is saved and a recomputation
gives the same bits.
"""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import flop_registry

from megatrain.config.schema import TrainConfig
from megatrain.models.block import Block

_ATEN = torch.ops.aten
# torch counts the operations of the fused attention of GPUs only
_OPERATIONS = {
    **flop_registry,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[_ATEN._scaled_dot_product_flash_attention],
}
_SMALL = 1024  # elements; smaller tensors are not worth a copy


def apply_recompute(model: nn.Module, train: TrainConfig) -> None:
    """Makes the blocks of ``model`` keep what ``train.activation_checkpointing`` says, on the host if so asked."""
    mode = train.activation_checkpointing
    for name, block in model.named_modules():
        if not isinstance(block, Block):
            continue
        number = int(name.rpartition(".")[2])
        if mode == "full" or (mode == "every_nth" and number % train.checkpoint_every_nth == 0):
            _wrap(block, "forward", _checkpointed)
        elif mode == "budget":
            _wrap(block, "forward", lambda run: _Budgeted(run, train.activation_budget))
        elif mode == "attention":
            for part in block.attention.recomputed():
                _wrap(part, "forward", _checkpointed)
        elif mode == "feed_forward":
            _wrap(block.feed_forward, "forward", _checkpointed)
        if train.offload_activations:
            _wrap(block, "forward", _offloaded)


def _wrap(module: nn.Module, method: str, wrapper: Callable[[Callable[..., Tensor]], Callable[..., Tensor]]) -> None:
    setattr(module, method, wrapper(getattr(module, method)))


def _checkpointed(run: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    """``run`` keeping only its arguments."""
    return functools.partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False, **options)


class _Budgeted:
    """Keeps the results of a block's most expensive products per byte, within a budget; computes the rest again.

    ``budget`` is a share of the bytes that the results of all its products and its attention take. Which are kept
    is decided at the first run, from the operations that really run.
    """

    def __init__(self, run: Callable[..., Tensor], budget: float):
        self._run, self._budget = run, budget
        self._kept: set[tuple[Any, int]] | None = None
        self._checkpointed = _checkpointed(run, context_fn=self._contexts)

    def __call__(self, x_SBD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x_SBD.is_meta or not torch.is_grad_enabled():
            return self._run(x_SBD, *args, **kwargs)
        if self._kept is None:
            with _ProductRecorder() as recorder:
                self._run(x_SBD, *args, **kwargs)
            self._kept = recorder.worth_keeping(self._budget)
        return self._checkpointed(x_SBD, *args, **kwargs)

    def _contexts(self) -> Any:
        counts: Counter[tuple[Any, bool]] = Counter()

        def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            number = counts[op, context.is_recompute]
            counts[op, context.is_recompute] += 1
            kept = self._kept is not None and (op, number) in self._kept
            return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)


class _ProductRecorder(TorchDispatchMode):
    """Notes the operations and bytes of every matrix product and attention that runs."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: Counter[Any] = Counter()
        self._products: list[tuple[float, int, tuple[Any, int]]] = []  # (operations per byte, bytes, which)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in _OPERATIONS:
            tensors = result if isinstance(result, tuple) else (result,)
            size = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
            operations = _OPERATIONS[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
            if size:  # an expert may have no rows
                self._products.append((operations / size, size, (func, self._counts[func])))
        self._counts[func] += 1
        return result

    def worth_keeping(self, budget: float) -> set[tuple[Any, int]]:
        """The products with the most operations per byte whose results fit ``budget`` x all their bytes."""
        room = budget * sum(size for _, size, _ in self._products)
        kept = set()
        for _, size, which in sorted(self._products, key=lambda product: -product[0]):
            if size <= room:
                kept.add(which)
                room -= size
        return kept


def _offloaded(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``run`` with what it keeps for the backward pass in host memory. Weights stay where they are."""

    def pack(tensor: Tensor) -> Any:
        weight = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        if weight or tensor.numel() < _SMALL:
            return tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        host.copy_(tensor)
        return tensor.device, host

    def unpack(packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else packed[1].to(packed[0])

    def offloaded(*args: Any, **kwargs: Any) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return run(*args, **kwargs)

    return offloaded
