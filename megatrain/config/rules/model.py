"""Rules of the model's shape."""

import math
from collections.abc import Iterator

from megatrain.config.reading.problems import Problem
from megatrain.config.rules.rule import rule
from megatrain.config.schema import RunConfig
from megatrain.spec.derive import chosen, head_width

_HEADS = ("model.hidden_size", "model.attention.num_heads", "model.attention.head_width")


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def listed(numbers: list[int]) -> str:
    """``numbers`` in words; the middle of a long list is left out."""
    if len(numbers) > 12:
        return ", ".join([*map(str, numbers[:9]), "…", *map(str, numbers[-2:])])
    return ", ".join(map(str, numbers))


@rule(*_HEADS)
def heads_divide_width(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Each head takes an equal slice of the stream."""
    model = config.model
    if model.attention.head_width is None and model.hidden_size % model.attention.num_heads:
        yield Problem(
            "model.attention.num_heads",
            model.attention.num_heads,
            f"does not divide model.hidden_size = {model.hidden_size}",
            listed(divisors(model.hidden_size)),
            f"choose one of these, make model.hidden_size a multiple of {model.attention.num_heads}, or set "
            "model.attention.head_width",
        )


@rule("model.family", "model.positions.kind", *_HEADS)
def rotary_needs_even_heads(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Rotary positions turn pairs of a head's numbers."""
    model, width = config.model, head_width(config.model)
    if chosen(model, "positions.kind") != "rotary" or width % 2 == 0:
        return
    if model.attention.head_width is not None:
        yield Problem(
            "model.attention.head_width",
            width,
            "is odd; rotary positions turn pairs",
            "even numbers",
            f"set model.attention.head_width to {width + 1}",
        )
    elif model.hidden_size % model.attention.num_heads == 0:
        good = [heads for heads in divisors(model.hidden_size) if (model.hidden_size // heads) % 2 == 0]
        yield Problem(
            "model.attention.num_heads",
            model.attention.num_heads,
            f"makes heads of width {width} (model.hidden_size = {model.hidden_size} / num_heads); "
            "rotary positions turn pairs, so the width must be even",
            listed(good) if good else f"none for model.hidden_size = {model.hidden_size}, which is odd",
            "choose one of these" if good else "choose an even model.hidden_size",
        )


@rule("model.attention.num_heads", "model.attention.num_kv_heads")
def groups_divide_heads(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Each key/value head serves equally many query heads."""
    model = config.model
    if model.attention.num_kv_heads is not None and model.attention.num_heads % model.attention.num_kv_heads:
        yield Problem(
            "model.attention.num_kv_heads",
            model.attention.num_kv_heads,
            f"does not divide model.attention.num_heads = {model.attention.num_heads}",
            listed(divisors(model.attention.num_heads)),
            "choose one of these; leave it out for plain multi-head attention",
        )


@rule("model.vocab_size", "model.vocab_padding")
def padding_leaves_tokens(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Some row of the embedding stands for a token."""
    padding, rows = config.model.vocab_padding, config.model.vocab_size
    if padding >= rows:
        yield Problem(
            "model.vocab_padding",
            padding,
            f"leaves no token of model.vocab_size = {rows} rows",
            f"0 to {rows - 1}",
            "count the rows that no token uses; vocab_size counts them too",
        )


@rule(
    "model.rope.scaling",
    "model.rope.low_freq_factor",
    "model.rope.high_freq_factor",
    "model.rope.beta_fast",
    "model.rope.beta_slow",
)
def scaled_frequencies_differ(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """The two ends of the transition between stretched and unstretched frequencies."""
    rope = config.model.rope
    ends = {
        "llama3": ("high_freq_factor", "low_freq_factor"),
        "yarn": ("beta_fast", "beta_slow"),
    }
    high, low = ends.get(rope.scaling, ("beta_fast", "beta_slow"))
    if rope.scaling in ends and getattr(rope, high) <= getattr(rope, low):
        yield Problem(
            f"model.rope.{high}",
            getattr(rope, high),
            f"is not more than model.rope.{low} = {getattr(rope, low)}",
            f"above {getattr(rope, low)}",
            f"raise model.rope.{high}, or lower model.rope.{low}",
        )


@rule("model.rope.scaling", "model.rope.short_factors", "model.rope.long_factors", *_HEADS)
def longrope_has_factors(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """One stretch for each frequency."""
    rope, width = config.model.rope, head_width(config.model)
    for name in ("short_factors", "long_factors"):
        given, wanted = getattr(rope, name), width // 2
        if rope.scaling == "longrope" and len(given or []) != wanted:
            yield Problem(
                f"model.rope.{name}",
                given,
                f"is not {wanted} numbers, which longrope needs for heads of width {width}",
                f"a list of {wanted} positive numbers",
                f"set model.rope.{name}, or choose another model.rope.scaling",
            )


@rule(
    "model.rope.scaling",
    "model.rope.theta",
    "model.rope.attention_factor",
    "model.rope.original_max_seq_len",
    "model.max_seq_len",
)
def stretch_is_defined(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """YaRN divides by the logarithm of the base (Peng et al. 2023, eq. 14), longrope's factor by that of the original
    length."""
    rope = config.model.rope
    original = rope.original_max_seq_len or config.model.max_seq_len
    if rope.scaling == "yarn" and rope.theta <= 1:
        yield Problem(
            "model.rope.theta",
            rope.theta,
            "is no base of frequencies that fall, which model.rope.scaling = yarn looks for",
            "above 1",
            "set model.rope.theta to 10000, or to that of the model which you go on with",
        )
    if rope.scaling == "longrope" and rope.attention_factor is None and original == 1:
        yield Problem(
            "model.rope.original_max_seq_len",
            1,
            "has the logarithm 0, by which longrope divides to find model.rope.attention_factor",
            "2 or more",
            "set model.rope.original_max_seq_len to the length first trained on, or set model.rope.attention_factor",
        )


@rule("data.seq_len", "model.max_seq_len")
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
