"""Rules of the layout: what the ranks can share, and how many there are."""

import math
from collections.abc import Iterator

from megatrain.config.derive import data_parallel_size, ffn_hidden_size
from megatrain.config.problems import Problem
from megatrain.config.rules_model import divisors, listed
from megatrain.config.schema import RunConfig
from megatrain.config.stages import SCHEDULES, num_stages


def ranks_fit_world(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """tp x cp x pp x dp ranks are asked for; exactly so many must be started."""
    if world_size is None:
        return
    parallel = config.parallel
    sizes = {"tp": parallel.tp, "cp": parallel.cp, "pp": parallel.pp, "dp": parallel.dp or 1}
    asked = math.prod(sizes.values())
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


def tensor_ranks_divide_model(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Each tensor rank holds an equal part of every split matrix: whole heads, equal rows."""
    model, tp = config.model, config.parallel.tp
    sizes = {"num_heads": model.num_heads, "ffn_hidden_size": ffn_hidden_size(model), "vocab_size": model.vocab_size}
    if model.num_kv_heads is not None:
        sizes["num_kv_heads"] = model.num_kv_heads
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


def sequence_parallel_fits(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Sequence parallelism lives between the tensor ranks, which take equal parts of the sequence."""
    parallel, seq_len = config.parallel, config.data.seq_len
    if not parallel.sequence_parallel:
        return
    if parallel.tp == 1:
        yield Problem(
            "parallel.sequence_parallel",
            True,
            "has no ranks to split the sequence over: parallel.tp = 1",
            "false where parallel.tp is 1",
            "set parallel.sequence_parallel to false, or parallel.tp to 2 or more",
        )
    elif seq_len % (unit := parallel.tp * parallel.cp):
        of_context = f" × parallel.cp = {parallel.cp}" if parallel.cp > 1 else ""
        yield Problem(
            "data.seq_len",
            seq_len,
            f"is not divisible by parallel.tp = {parallel.tp}{of_context}, over which parallel.sequence_parallel "
            "splits it",
            f"multiples of {unit}",
            f"set data.seq_len to {max(1, seq_len // unit) * unit}, or parallel.sequence_parallel to false",
        )


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


def ulysses_divides_heads(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Ulysses gives each context rank an equal part of the query heads of its tensor rank."""
    parallel, heads = config.parallel, config.model.num_heads
    if parallel.cp == 1 or parallel.cp_method != "ulysses" or heads % parallel.tp:
        return
    if heads % (parallel.tp * parallel.cp):
        yield Problem(
            "model.num_heads",
            heads,
            f"is not divisible by parallel.tp = {parallel.tp} × parallel.cp = {parallel.cp}, over which "
            "parallel.cp_method = ulysses splits the heads",
            f"multiples of {parallel.tp * parallel.cp}",
            f"set parallel.cp to one of {listed(divisors(heads // parallel.tp))}, or parallel.cp_method to all_gather",
        )


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


def zero_fits_pipeline(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Only the ZeRO stages that leave gradients whole work under a pipeline."""
    parallel = config.parallel
    if parallel.pp > 1 and parallel.zero_stage > 1:
        yield Problem(
            "parallel.zero_stage",
            parallel.zero_stage,
            f"cannot be used with a pipeline (parallel.pp = {parallel.pp}): ZeRO-2 and ZeRO-3 partition "
            "gradients inside backward hooks, which a pipeline schedule's backward for several micro-batches "
            "does not go through",
            "0 or 1 where parallel.pp is more than 1",
            "set parallel.zero_stage to 0 or 1, or parallel.pp to 1",
        )


def schedule_fits_stages(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """How many stages a schedule puts on a rank; only a pipeline has several."""
    parallel = config.parallel
    traits, several = SCHEDULES[parallel.pp_schedule], parallel.stages_per_rank > 1
    least, most = traits.least_stages, traits.most_stages
    if parallel.stages_per_rank < least or (most is not None and parallel.stages_per_rank > most):
        others = "interleaved_1f1b or interleaved_zero_bubble" if several else "1f1b or gpipe"
        yield Problem(
            "parallel.stages_per_rank",
            parallel.stages_per_rank,
            f"does not fit parallel.pp_schedule = {parallel.pp_schedule}",
            "1 with gpipe and 1f1b; 2 with zbv and dualpipev; 2 or more with the interleaved schedules",
            f"set parallel.stages_per_rank to {least}, or parallel.pp_schedule to {others}",
        )
    elif several and parallel.pp == 1:
        yield Problem(
            "parallel.stages_per_rank",
            parallel.stages_per_rank,
            "needs a pipeline, and parallel.pp = 1",
            "1 where parallel.pp is 1",
            "set parallel.pp to 2 or more, or parallel.stages_per_rank to 1 and parallel.pp_schedule to 1f1b",
        )


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


def recompute_fits_schedule(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """A schedule that splits the backward pass runs a block's graph once for inputs and once for each weight."""
    parallel, mode = config.parallel, config.train.activation_checkpointing
    if parallel.pp > 1 and SCHEDULES[parallel.pp_schedule].splits_backward and mode not in ("none", "attention"):
        yield Problem(
            "train.activation_checkpointing",
            mode,
            f"cannot be used with parallel.pp_schedule = {parallel.pp_schedule}, which computes the gradients of "
            "inputs and of each weight apart: the block would be computed again for every one of them",
            "none or attention, or any with gpipe, 1f1b and interleaved_1f1b",
            "set train.activation_checkpointing to none or attention, or parallel.pp_schedule to interleaved_1f1b",
        )


def budget_fits_zero(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """The policy counts a block's operations; ZeRO 3 adds others to the forward than to its repetition."""
    if config.parallel.zero_stage == 3 and config.train.activation_checkpointing == "budget":
        yield Problem(
            "train.activation_checkpointing",
            "budget",
            "cannot be used with parallel.zero_stage = 3, which fetches and frees weights inside a block, "
            "differently when the block is computed again",
            "none, full, every_nth, attention or feed_forward where parallel.zero_stage is 3",
            "set train.activation_checkpointing to full, or parallel.zero_stage to 2",
        )


def optimizer_fits_zero(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """ZeRO 3 hands out weights piece by piece; Muon needs whole matrices."""
    if config.optimizer.name == "muon" and config.parallel.zero_stage == 3:
        yield Problem(
            "optimizer.name",
            "muon",
            "cannot be used with parallel.zero_stage = 3, which updates pieces of matrices, not whole ones",
            "adamw or lion where parallel.zero_stage is 3",
            "set optimizer.name to adamw or lion, or parallel.zero_stage to 0, 1 or 2",
        )


def offload_fits(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """What DeepSpeed can move away from the GPU depends on what ZeRO shards; a disk needs a path."""
    offload, stage = config.offload, config.parallel.zero_stage
    for name, device in (("optimizer", offload.optimizer), ("parameters", offload.parameters)):
        least = 3 if name == "parameters" or device == "nvme" else 1
        if device != "none" and stage < least:
            yield Problem(
                f"offload.{name}",
                device,
                f"needs parallel.zero_stage = {least} or more, and it is {stage}",
                f"none where parallel.zero_stage is less than {least}",
                f"set parallel.zero_stage to {least}, or offload.{name} to none",
            )
        elif device == "nvme" and offload.nvme_path is None:
            yield Problem(
                "offload.nvme_path",
                None,
                f"names no folder, and offload.{name} = nvme",
                "a folder on a local disk",
                f"set offload.nvme_path, or offload.{name} to cpu",
            )
    yield from _optimizer_on_host(config)


def _optimizer_on_host(config: RunConfig) -> Iterator[Problem]:
    name, device, pp = config.optimizer.name, config.offload.optimizer, config.parallel.pp
    if name == "cpu_adamw" and device == "none":
        yield Problem(
            "optimizer.name",
            name,
            "updates weights in host memory, and offload.optimizer = none keeps them elsewhere",
            "adamw, lion or muon where offload.optimizer is none",
            "set offload.optimizer to cpu, or optimizer.name to adamw",
        )
    elif name == "muon" and device != "none":
        yield Problem(
            "offload.optimizer",
            device,
            "cannot be used with optimizer.name = muon, which gathers matrices between GPUs",
            "none with muon",
            "set offload.optimizer to none, or optimizer.name to cpu_adamw",
        )
    elif device != "none" and pp > 1:
        yield Problem(
            "offload.optimizer",
            device,
            f"cannot be used with a pipeline (parallel.pp = {pp}): DeepSpeed then sums gradients on the host inside "
            "backward hooks, which see a schedule's micro-batches as one",
            "none where parallel.pp is more than 1",
            "set offload.optimizer to none, or parallel.pp to 1",
        )


def compile_fits_schedule(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """A compiled block is one node of the graph, whose backward cannot be split."""
    parallel = config.parallel
    if config.train.compile and parallel.pp > 1 and SCHEDULES[parallel.pp_schedule].splits_backward:
        yield Problem(
            "train.compile",
            True,
            f"cannot be used with parallel.pp_schedule = {parallel.pp_schedule}: the backward pass of a compiled block "
            "gives the gradients of inputs and weights at once",
            "false, or gpipe, 1f1b or interleaved_1f1b",
            "set train.compile to false, or parallel.pp_schedule to interleaved_1f1b",
        )
