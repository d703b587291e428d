"""Rules of the layout: what the ranks can share, and how many there are."""

import math
from collections.abc import Iterator

from megatrain.config.derive import data_parallel_size, num_ranks
from megatrain.config.pipeline_schedules import PIPELINE_SCHEDULES
from megatrain.config.reading.problems import Problem
from megatrain.config.rules.model import divisors, listed
from megatrain.config.rules.rule import LAYOUT, rule
from megatrain.config.schema import RunConfig
from megatrain.config.stages import num_stages
from megatrain.spec.derive import ffn_hidden_size


@rule(*LAYOUT)
def ranks_fit_world(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """tp x cp x pp x dp ranks are asked for; exactly so many must be started."""
    if world_size is None:
        return
    parallel = config.parallel
    sizes = {"tp": parallel.tp, "cp": parallel.cp, "pp": parallel.pp, "dp": parallel.dp or 1}
    asked = num_ranks(parallel)
    product = " × ".join(f"{axis} {size}" for axis, size in sizes.items())
    # the largest axis is the likeliest to be wrong; dp last, as it is the one that can be left out
    key = max(("dp", "tp", "cp", "pp") if parallel.dp else ("tp", "cp", "pp"), key=lambda axis: sizes[axis])
    started = f"{world_size} {'was' if world_size == 1 else 'were'} started"
    if asked > world_size:
        yield Problem(
            f"parallel.{key}",
            sizes[key],
            f"more ranks asked for than started: {product} = {asked} ranks, {started}",
            f"tp × cp × pp × dp of at most {world_size}",
            f"start {asked} ranks (deepspeed --num_gpus {asked} …), or lower {_names(parallel.dp)}",
        )
    elif parallel.dp is not None and asked < world_size:
        yield Problem(
            "parallel.dp",
            parallel.dp,
            f"fewer ranks asked for than started: {product} = {asked} ranks, {started}",
            f"tp × cp × pp × dp = {world_size}",
            f"leave parallel.dp out, or start {asked} ranks (deepspeed --num_gpus {asked} …)",
        )
    elif world_size % asked:
        below = world_size // asked * asked
        yield Problem(
            f"parallel.{key}",
            sizes[key],
            f"copies of the model take tp × cp × pp = {asked} ranks, and {started}: {world_size % asked} left over",
            f"tp × cp × pp of {listed(divisors(world_size))}",
            f"start {below} or {below + asked} ranks (deepspeed --num_gpus …), or change {_names(None)}",
        )


def _names(dp: int | None) -> str:
    return f"parallel.tp, parallel.cp{',' if dp else ' or'} parallel.pp{' or parallel.dp' if dp else ''}"


@rule(
    "parallel.tp",
    "model.family",
    "model.hidden_size",
    "model.attention.num_heads",
    "model.attention.num_kv_heads",
    "model.feed_forward.hidden_size",
    "model.feed_forward.activation",
    "model.vocab_size",
)
def tensor_ranks_divide_model(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Each tensor rank holds an equal part of every split matrix: whole heads, equal rows."""
    model, tp = config.model, config.parallel.tp
    sizes = {
        "attention.num_heads": model.attention.num_heads,
        "feed_forward.hidden_size": ffn_hidden_size(model),
        "vocab_size": model.vocab_size,
    }
    if model.attention.num_kv_heads is not None:
        sizes["attention.num_kv_heads"] = model.attention.num_kv_heads
    good = listed(divisors(math.gcd(*sizes.values())))
    for name, size in sizes.items():
        if size % tp:
            above = math.ceil(size / tp) * tp
            yield Problem(
                f"model.{name}",
                size,
                f"is not divisible by parallel.tp = {tp}",
                f"multiples of {tp}",
                f"set model.{name} to {above}, or parallel.tp to a size that divides all that it splits: {good}",
            )


@rule("parallel.sequence_parallel", "parallel.tp", "parallel.cp", "data.seq_len", of_each_shape=True)
def sequence_parallel_fits(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Sequence parallelism lives between the tensor ranks, which take equal parts of the sequence."""
    parallel, seq_len = config.parallel, config.data.seq_len
    if parallel.sequence_parallel and seq_len % (unit := parallel.tp * parallel.cp):
        of_context = f" × parallel.cp = {parallel.cp}" if parallel.cp > 1 else ""
        yield Problem(
            "data.seq_len",
            seq_len,
            f"is not divisible by parallel.tp = {parallel.tp}{of_context}, over which parallel.sequence_parallel "
            "splits it",
            f"multiples of {unit}",
            f"set data.seq_len to {max(1, seq_len // unit) * unit}, or parallel.sequence_parallel to false",
        )


@rule("parallel.cp", "parallel.cp_method", "data.seq_len", of_each_shape=True)
def context_fits_sequence(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Context ranks hold equal parts of the sequence; all_gather halves them, to balance the causal mask."""
    parallel, seq_len = config.parallel, config.data.seq_len
    chunks = parallel.cp * (2 if parallel.cp_method == "all_gather" else 1)
    if parallel.cp > 1 and seq_len % chunks:
        halves = " × 2" if parallel.cp_method == "all_gather" else ""
        yield Problem(
            "data.seq_len",
            seq_len,
            f"is not divisible by parallel.cp = {parallel.cp}{halves} (parallel.cp_method = {parallel.cp_method})",
            f"multiples of {chunks}",
            f"set data.seq_len to {max(1, seq_len // chunks) * chunks}, or parallel.cp to another size",
        )


@rule("parallel.cp", "parallel.cp_method", "parallel.tp", "model.attention.num_heads")
def ulysses_divides_heads(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Ulysses gives each context rank an equal part of the query heads of its tensor rank."""
    parallel, heads = config.parallel, config.model.attention.num_heads
    if parallel.cp == 1 or parallel.cp_method != "ulysses" or heads % parallel.tp:
        return
    if heads % (parallel.tp * parallel.cp):
        yield Problem(
            "model.attention.num_heads",
            heads,
            f"is not divisible by parallel.tp = {parallel.tp} × parallel.cp = {parallel.cp}, over which "
            "parallel.cp_method = ulysses splits the heads",
            f"multiples of {parallel.tp * parallel.cp}",
            f"set parallel.cp to one of {listed(divisors(heads // parallel.tp))}, or parallel.cp_method to all_gather",
        )


@rule(*LAYOUT, "parallel.ep")
def expert_ranks_share_data_ranks(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """The ranks that share the experts are taken from those that hold the same dense weights."""
    parallel, dp = config.parallel, data_parallel_size(config, world_size)
    if dp is not None and dp * parallel.cp % parallel.ep:
        yield Problem(
            "parallel.ep",
            parallel.ep,
            f"does not divide the parallel.cp = {parallel.cp} × dp = {dp} ranks that it shares out",
            listed(divisors(dp * parallel.cp)),
            "choose one of these, or another number of ranks",
        )


@rule("model.num_layers", "parallel.pp", "parallel.stages_per_rank")
def layers_fill_stages(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """A stage without a layer has nothing to do."""
    parallel, num_layers = config.parallel, config.model.num_layers
    stages = num_stages(parallel)
    if num_layers < stages:
        yield Problem(
            "model.num_layers",
            num_layers,
            f"is less than the {stages} pipeline stages of parallel.pp = {parallel.pp} "
            f"× parallel.stages_per_rank = {parallel.stages_per_rank}",
            f"at least {stages}",
            f"use {stages} layers or more, or a smaller parallel.pp or parallel.stages_per_rank",
        )


@rule("parallel.pp_schedule", "parallel.stages_per_rank")
def schedule_fits_stages(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """How many stages a schedule puts on a rank."""
    parallel = config.parallel
    schedule = PIPELINE_SCHEDULES[parallel.pp_schedule]
    if not schedule.takes_stages(parallel.stages_per_rank):
        fitting = [name for name, one in PIPELINE_SCHEDULES.items() if one.takes_stages(parallel.stages_per_rank)]
        others = " or ".join(fitting)
        by_stages: dict[str, list[str]] = {}
        for name, one in PIPELINE_SCHEDULES.items():
            by_stages.setdefault(one.stages_in_words, []).append(name)
        yield Problem(
            "parallel.stages_per_rank",
            parallel.stages_per_rank,
            f"does not fit parallel.pp_schedule = {parallel.pp_schedule}",
            "; ".join(f"{stages} with {' and '.join(names)}" for stages, names in sorted(by_stages.items())),
            f"set parallel.stages_per_rank to {schedule.least_stages}, or parallel.pp_schedule to {others}",
        )


@rule("parallel.stage_layers", "model.num_layers", "parallel.pp", "parallel.stages_per_rank")
def stage_layers_fit(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """A list of stages names all stages and all blocks."""
    parallel, num_layers = config.parallel, config.model.num_layers
    sizes, stages = parallel.stage_layers, num_stages(parallel)
    if sizes is None or (len(sizes) == stages and sum(sizes) == num_layers):
        return
    yield Problem(
        "parallel.stage_layers",
        sizes,
        f"names {len(sizes)} stages with {sum(sizes)} blocks together; there are {stages} stages (parallel.pp × "
        f"parallel.stages_per_rank) and model.num_layers = {num_layers}",
        f"{stages} numbers whose sum is {num_layers}",
        "correct the list, or leave it out: the blocks are then shared by computed cost",
    )


@rule("offload.optimizer", "offload.parameters", "offload.nvme_path")
def offload_has_a_path(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """A disk needs a path."""
    offload = config.offload
    for name, device in (("optimizer", offload.optimizer), ("parameters", offload.parameters)):
        if device == "nvme" and offload.nvme_path is None:
            yield Problem(
                "offload.nvme_path",
                None,
                f"names no folder, and offload.{name} = nvme",
                "a folder on a local disk",
                f"set offload.nvme_path, or offload.{name} to cpu",
            )
