"""Rules of the model's shape."""

import math
from collections.abc import Iterator

from megatrain.config.derive import head_width
from megatrain.config.problems import Problem
from megatrain.config.schema import RunConfig


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def listed(numbers: list[int]) -> str:
    """``numbers`` in words; the middle of a long list is left out."""
    if len(numbers) > 12:
        return ", ".join([*map(str, numbers[:9]), "…", *map(str, numbers[-2:])])
    return ", ".join(map(str, numbers))


def heads_divide_width(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Each head takes an equal slice of the stream."""
    model = config.model
    if model.hidden_size % model.num_heads:
        yield Problem(
            "model.num_heads",
            model.num_heads,
            f"does not divide model.hidden_size = {model.hidden_size}",
            listed(divisors(model.hidden_size)),
            f"choose one of these, or make model.hidden_size a multiple of {model.num_heads}",
        )


def rotary_needs_even_heads(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Rotary positions turn pairs of a head's numbers."""
    model = config.model
    if model.family == "llama" and model.hidden_size % model.num_heads == 0 and head_width(model) % 2:
        good = [heads for heads in divisors(model.hidden_size) if (model.hidden_size // heads) % 2 == 0]
        yield Problem(
            "model.num_heads",
            model.num_heads,
            f"makes heads of width {head_width(model)} (model.hidden_size = {model.hidden_size} / num_heads); "
            "rotary positions turn pairs, so the width must be even",
            listed(good) if good else f"none for model.hidden_size = {model.hidden_size}, which is odd",
            "choose one of these" if good else "choose an even model.hidden_size",
        )


def groups_divide_heads(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Each key/value head serves equally many query heads."""
    model = config.model
    if model.num_kv_heads is not None and model.num_heads % model.num_kv_heads:
        yield Problem(
            "model.num_kv_heads",
            model.num_kv_heads,
            f"does not divide model.num_heads = {model.num_heads}",
            listed(divisors(model.num_heads)),
            "choose one of these; leave it out for plain multi-head attention",
        )


def sequence_fits_positions(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """A model has positions for so many tokens only."""
    seq_len, longest = config.data.seq_len, config.model.max_seq_len
    if seq_len > longest:
        yield Problem(
            "data.seq_len",
            seq_len,
            f"is more than model.max_seq_len = {longest}",
            f"1 to {longest}",
            f"set data.seq_len to {longest} or less, or model.max_seq_len to {seq_len} or more",
        )
