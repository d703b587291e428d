"""Mistakes in activation checkpointing: other blocks than asked for, a budget that is none, tensors that get lost."""

from tests.mutants.mutant import Mutant


def _m(old: str, new: str, kind: str) -> Mutant:
    return Mutant("models/recompute.py", old, new, kind, ("recompute",))


MUTANTS = [
    _m("number % train.checkpoint_every_nth == 0", "number % train.checkpoint_every_nth == 1", "off by one"),
    _m('_wrap(block.feed_forward, "forward", _checkpointed)', '_wrap(block, "forward", _checkpointed)', "too much"),
    _m("            if size <= room:\n", "            if True:\n", "ignored option"),
    _m("key=lambda product: -product[0])", "key=lambda product: product[0])", "wrong order"),
    _m("(operations / size, size, (func", "(operations, size, (func", "missing divisor"),
    _m("size for _, size, _ in self._products)", "1 for _, size, _ in self._products)", "wrong size"),
    _m("number = counts[op, context.is_recompute]", "number = counts[op, True]", "stale state"),
    _m("        host.copy_(tensor)\n", "", "dropped statement"),
    _m("if weight or tensor.numel() < _SMALL:", "if tensor.numel() < _SMALL:", "dropped condition"),
]
