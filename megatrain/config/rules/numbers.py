"""Numbers that a config may hold and a step in FP32 may not."""

from collections.abc import Iterator

from megatrain.config.reading.fields import all_fields, value_at
from megatrain.config.reading.problems import Problem
from megatrain.config.schema import RunConfig

LEAST, MOST = 2.0**-126, 2.0**128 - 2.0**104
"""The least normal number of FP32 and its largest one (IEEE 754-2019, binary32)."""
NUMBER_FIELDS = tuple(key for key, field in all_fields().items() if field.kind == "number")


def fits_fp32(key: str, config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """A step would compute with 0 or infinity in the place of such a number, and formulas would divide by it."""
    value = value_at(config, key)
    if isinstance(value, float) and value != 0 and not LEAST <= abs(value) <= MOST:
        end, cure = ("below", LEAST) if abs(value) < LEAST else ("above", MOST)
        yield Problem(
            key,
            value,
            f"is {end} the numbers of FP32, in which it is computed",
            f"numbers from {LEAST:.2g} to {MOST:.2g}",
            f"set {key} to {cure:.2g}, or nearer to the default, {all_fields()[key].default}",
        )
