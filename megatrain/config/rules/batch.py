"""Rules of the batch, the schedule of the learning rate, and the loss scale."""

import math
from collections.abc import Iterator

from megatrain.config.derive import data_parallel_size
from megatrain.config.pipeline_schedules import PIPELINE_SCHEDULES
from megatrain.config.reading.problems import Problem
from megatrain.config.rules.model import divisors, listed
from megatrain.config.rules.rule import LAYOUT, rule
from megatrain.config.schema import RunConfig

_BATCH = ("train.global_batch_size", "train.micro_batch_size")


@rule(*_BATCH, *LAYOUT, of_each_shape=True)
def batch_divides(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Every rank makes the same number of whole micro-batches in a step."""
    train, dp = config.train, data_parallel_size(config, world_size)
    unit = train.micro_batch_size * (dp or 1)
    if train.global_batch_size % unit == 0:
        return
    at_once = f"train.micro_batch_size = {train.micro_batch_size}"
    if dp is not None:
        at_once += f" × dp = {dp}"
    below = train.global_batch_size // unit * unit
    cure = f"set train.global_batch_size to {' or '.join(str(size) for size in (below, below + unit) if size)}"
    if train.global_batch_size % (dp or 1) == 0:
        sizes = listed(divisors(train.global_batch_size // (dp or 1)))
        cure += f", or train.micro_batch_size to one of {sizes}"
    yield Problem(
        "train.global_batch_size",
        train.global_batch_size,
        f"is not divisible by the {unit} sequences that are computed at once: {at_once}",
        f"multiples of {unit}",
        cure,
    )


@rule(*_BATCH, *LAYOUT, "parallel.pp_schedule", of_each_shape=True)
def pipeline_has_micro_batches(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """What torch's pipeline schedules ask of the number of micro-batches."""
    train, pp, dp = config.train, config.parallel.pp, data_parallel_size(config, world_size)
    unit = train.micro_batch_size * (dp or 1)
    if pp == 1 or train.global_batch_size % unit:  # the latter is reported by `batch_divides`
        return
    name = config.parallel.pp_schedule
    schedule = PIPELINE_SCHEDULES[name]
    num_micro_batches = train.global_batch_size // unit  # at least so few if dp is not known yet
    if (dp is None and schedule.in_rounds) or schedule.takes_micro_batches(num_micro_batches, pp):
        return
    below = [number for number in range(num_micro_batches, 0, -1) if schedule.takes_micro_batches(number, pp)][:1]
    above = next(
        number
        for number in range(num_micro_batches, 2 * num_micro_batches + 2 * pp + 1)
        if schedule.takes_micro_batches(number, pp)
    )
    if schedule.in_rounds:
        why = f"; {name} runs them in {num_micro_batches // pp} equal rounds, one per parallel.pp = {pp} of them"
        allowed = f"multiples of {unit * pp}, and a few between them"
    else:
        least = schedule.in_flight * pp
        why = f": too few for {name} with parallel.pp = {pp}, which keeps {least} under way"
        allowed = f"multiples of {unit} from {least * unit} on"
    sizes = " or ".join(str(number * unit) for number in [*below, above])
    yield Problem(
        "train.global_batch_size",
        train.global_batch_size,
        f"makes {num_micro_batches} micro-batches of a rank in a step{why}",
        allowed,
        f"set train.global_batch_size to {sizes}, lower train.micro_batch_size, or use another parallel.pp_schedule",
    )


@rule("schedule.name", "schedule.warmup_steps", "schedule.decay_steps", "train.steps")
def decay_follows_warmup(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """The decay comes after the warm-up.

    It may be longer than the run: that is a long schedule, stopped early. A wsd schedule is cut to the run (clip.py).
    """
    schedule = config.schedule
    if schedule.name not in ("cosine", "linear") or schedule.decay_steps is None:
        return
    if schedule.decay_steps <= schedule.warmup_steps:
        yield Problem(
            "schedule.decay_steps",
            schedule.decay_steps,
            f"is the step at which {schedule.name} reaches its minimum, and the warm-up lasts until "
            f"schedule.warmup_steps = {schedule.warmup_steps}",
            f"more than {schedule.warmup_steps}",
            f"leave it out (train.steps = {config.train.steps}), or set it to more than {schedule.warmup_steps}",
        )


@rule("precision.initial_loss_scale", "precision.min_loss_scale")
def loss_scales_fit(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """The scale moves by factors of two, so that it never rounds a gradient, from the first one down to the least.

    DeepSpeed 0.19.8 takes whole numbers only for both.
    """
    precision = config.precision
    scales = {"initial_loss_scale": precision.initial_loss_scale, "min_loss_scale": precision.min_loss_scale}
    for name, scale in scales.items():
        if scale < 1:
            yield Problem(
                f"precision.{name}",
                scale,
                "is less than 1, where DeepSpeed keeps the loss scale",
                "1, 2, 4, 8, … 65536, …",
                f"set precision.{name} to 1; gradients that overflow at that scale need precision.dtype = bf16",
            )
        elif math.frexp(scale)[0] != 0.5:
            below = 2.0 ** math.floor(math.log2(scale))
            yield Problem(
                f"precision.{name}",
                scale,
                "is not a power of 2",
                "1, 2, 4, 8, … 65536, …",
                f"set precision.{name} to {below:g} or {2 * below:g}",
            )
    if 1 <= precision.initial_loss_scale < precision.min_loss_scale:
        yield Problem(
            "precision.min_loss_scale",
            precision.min_loss_scale,
            f"is more than precision.initial_loss_scale = {precision.initial_loss_scale:g}",
            f"powers of 2 up to {precision.initial_loss_scale:g}",
            "lower precision.min_loss_scale, or raise precision.initial_loss_scale",
        )
