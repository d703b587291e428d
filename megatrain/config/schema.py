"""What a run is: every field that a user may set, with its type, unit and default.

Pure data: rules between fields stand in ``rules``, computed values in ``derive``.
Names follow the field's usual terms: ``tp cp pp dp ep`` are the axes of the mesh, ``num_*`` are
counts, sizes are in elements unless the description gives a unit.
"""

from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from megatrain.config.schema_optimizer import OffloadConfig, OptimizerConfig, ScheduleConfig
from megatrain.spec.schema import ModelConfig, ModelSpec
from megatrain.spec.section import (
    Name,
    Natural,
    PathText,
    Positive,
    PositiveFloat,
    RunName,
    Section,
)

__all__ = ["OffloadConfig", "OptimizerConfig", "ScheduleConfig"]


class ParallelConfig(Section):
    """Layout: how the run is spread over ranks. It never changes the numbers."""

    tp: Positive = Field(1, description="Tensor-parallel size: ranks that share every matrix.")
    pp: Positive = Field(1, description="Pipeline-parallel size: ranks that share the layers.")
    cp: Positive = Field(1, description="Context-parallel size: ranks that share every sequence.")
    cp_method: Literal["all_gather", "ulysses"] = Field(
        "all_gather",
        description="How attention sees the whole sequence: all_gather collects keys and values (any number of heads); "
        "ulysses trades positions for heads (cp must divide the heads of a tensor rank).",
    )
    ep: Positive = Field(1, description="Expert-parallel size: ranks, of the dp × cp, that share the experts.")
    dp: Positive | None = Field(
        None, description="Data-parallel size; default: the ranks that tp, cp and pp leave over."
    )
    sequence_parallel: bool = Field(
        False, description="Split the activations between tensor-parallel regions over the sequence."
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="ZeRO: 0 shards nothing, 1 optimizer state, 2 also gradients, 3 also weights."
    )
    pp_schedule: Literal["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"] = Field(
        "1f1b",
        description="Order of the pipeline's work; docs/pipeline.md compares them.",
    )
    stages_per_rank: Positive = Field(
        1, description="Pipeline stages on each rank: 1 for gpipe and 1f1b, 2 for zbv and dualpipev, 2 or more else."
    )
    stage_layers: list[Positive] | None = Field(
        None,
        description="Blocks of each pipeline stage, first to last; default: by computed cost, the head included.",
    )


class PrecisionConfig(Section):
    """Number formats. Master weights and moments are always FP32."""

    dtype: Literal["fp32", "bf16", "fp16"] = Field("bf16", description="Type of weights and activations in the step.")
    gradient_dtype: Literal["fp32", "compute"] = Field(
        "fp32", description="Type in which gradients are summed over micro-batches and ranks; compute: that of dtype."
    )
    residual_dtype: Literal["fp32", "compute"] = Field(
        "compute", description="Type of the residual stream; fp32: 16-bit sublayers add to an FP32 sum."
    )
    logits_dtype: Literal["fp32", "compute"] = Field(
        "compute", description="Type of the head's product. The loss is always computed in FP32."
    )
    initial_loss_scale: PositiveFloat = Field(65536.0, description="FP16: first dynamic loss scale (a power of 2).")
    loss_scale_window: Positive = Field(1000, description="FP16: steps without overflow before the scale doubles.")
    loss_scale_hysteresis: Positive = Field(1, description="FP16: overflows in a row before the scale halves.")
    min_loss_scale: PositiveFloat = Field(
        1.0, description="FP16: an overflow at this scale ends the run, as train.max_skipped_steps of them do."
    )


def _weight(value: Any) -> Any:
    """Weights are exact: 0.3 is three tenths, and no binary fraction near it."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return value
    try:
        weight = Fraction(str(value))
    except (ValueError, ZeroDivisionError):
        raise ValueError("no number") from None
    if weight < 0:
        raise ValueError("negative")
    return str(weight)


def _sources(value: Any) -> Any:
    """A folder alone is one source of that name; a source may be its folder alone."""
    if isinstance(value, str):
        return {"train": {"path": value}} if value else {}
    if isinstance(value, dict):
        return {name: {"path": source} if isinstance(source, str) else source for name, source in value.items()}
    return value


def _validation_sets(value: Any) -> Any:
    return {"validation": value} if isinstance(value, str) else {} if value is None else value


SourceWeight = Annotated[str, BeforeValidator(_weight, json_schema_input_type=int | float | str)]


class SourceConfig(Section):
    """One of several training data sets."""

    path: PathText = Field(min_length=1, description="Folder of the data set.")
    weight: SourceWeight = Field("1", description="Share of the samples, relative to the other sources: 3, 0.3 or 3/7.")
    max_epochs: PositiveFloat | None = Field(
        None, description="The source gives no more samples after so many epochs; the others take its share."
    )


class WeightChange(Section):
    """Other weights from some sample on."""

    from_sample: Positive = Field(description="Number of the first sample that they hold for.")
    weights: dict[Name, SourceWeight] = Field(description="By source; those that are not named keep their weights.")


WHOLE_DOCUMENTS = ("pack_documents", "one_document")
"""The values of data.sequences that cut no document which fits."""


class DataConfig(Section):
    """Token shards to read (folders made by data_tools/tokenize_text.py)."""

    train: Annotated[
        dict[Name, SourceConfig],
        BeforeValidator(_sources, json_schema_input_type=str | dict[Name, str | SourceConfig]),
    ] = Field(
        default_factory=dict,
        description="Folder of the training data set, or several, `NAME: folder` or `NAME: {path, weight, …}`.",
    )
    validation: Annotated[
        dict[Name, PathText], BeforeValidator(_validation_sets, json_schema_input_type=str | dict[Name, str] | None)
    ] = Field(
        default_factory=dict,
        description="Folder of the validation data set, or several, `NAME: folder`, each evaluated for itself; "
        "none: no evaluation.",
    )
    weigh_by: Literal["weight", "tokens"] = Field(
        "weight",
        description="tokens: a source's share is its weight times its tokens to the power of 1/temperature.",
    )
    temperature: PositiveFloat = Field(
        1.0, description="weigh_by tokens: above 1, small sources get more than their part (Devlin et al. 2019)."
    )
    weight_schedule: list[WeightChange] = Field(
        default_factory=list, description="Other weights later: `{from_sample, weights: {NAME: weight}}`, in order."
    )
    sequences: Literal["concatenate", "mask_documents", "pack_documents", "one_document"] = Field(
        "concatenate",
        description="concatenate: windows of one long stream. mask_documents: the same, but attention stays inside "
        "documents, and positions restart. pack_documents: whole documents, best fit (Ding et al. 2024), masked like "
        "that. one_document: one in each sequence, and padding. Documents longer than a sequence are cut.",
    )
    objective: Literal["causal", "masked"] = Field(
        "causal",
        description="causal: each token's label is the next one. masked: some tokens are hidden or replaced, and are "
        "labels where they stood (BERT, Devlin et al. 2019); for blocks that see both ways.",
    )
    mask_probability: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.15, description="masked: how likely a token is chosen as a label."
    )
    mask_token: Natural | None = Field(
        None,
        description="masked: id of the token that hides others; default: that of [MASK] or <mask> in the tokenizer.",
    )
    eod_loss: bool | None = Field(
        None,
        description="Whether the first token of a document has a loss as the label of the end of the one before; "
        "default: only in concatenate. Not for whole documents, whose end never has a loss.",
    )
    tokenizer: PathText | None = Field(
        None, description="tokenizer.json for generated samples; default: the one named in the data set's manifest."
    )
    seq_len: Positive = Field(256, description="Tokens S in a training sequence.")
    seed: Natural = Field(1234, description="Seed of the sample order.")


class RampStage(Section):
    """A smaller or shorter batch, until some step."""

    until_step: Positive = Field(description="The last step that it holds for (the first step is 1).")
    global_batch_size: Positive | None = Field(None, description="Sequences in a step; default: as after the ramp.")
    seq_len: Positive | None = Field(
        None, description="Tokens in a sequence, a divisor of data.seq_len; default: data.seq_len."
    )


class TrainConfig(Section):
    """The loop."""

    steps: Positive = Field(100, description="Optimizer steps of the whole run.")
    global_batch_size: Positive = Field(8, description="Sequences in one optimizer step, over all ranks.")
    ramp: list[RampStage] = Field(
        default_factory=list,
        description="Smaller or shorter batches at first: `{until_step, global_batch_size, seq_len}`, in order. "
        "After the last, global_batch_size and data.seq_len hold.",
    )
    micro_batch_size: Positive = Field(1, description="Sequences in one forward pass of one rank.")
    seed: Natural = Field(1234, description="Seed of the initial weights and of dropout.")
    max_skipped_steps: Positive = Field(
        20,
        description="Steps in a row whose gradients may be NaN or infinite. Such a step changes nothing; the last of "
        "so many ends the run.",
    )
    activation_checkpointing: Literal["none", "full", "every_nth", "attention", "feed_forward", "budget"] = Field(
        "none",
        description="What is computed again in the backward pass instead of kept. full: all of each block; every_nth: "
        "all of some blocks; attention: scores and their softmax; feed_forward: that sublayer; budget: all but the "
        "results of products within activation_budget.",
    )
    checkpoint_every_nth: Positive = Field(2, description="every_nth: recompute the blocks 0, n, 2n, ….")
    activation_budget: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.5,
        description="budget: share of the bytes of a block's matrix products and attention that is kept, "
        "those with the most operations per byte first.",
    )
    offload_activations: bool = Field(
        False, description="Keep what blocks save for the backward pass in host memory instead of on the GPU."
    )
    compile: bool = Field(
        False,
        description="torch.compile each block (needs a C++ compiler on CPU); runs as it is, with a message, where "
        "that does not work.",
    )
    deterministic: bool = Field(
        False,
        description="Two runs of one layout, and a run that was restarted, have the same bits on one kind of machine; "
        "docs/parity.md says what it fixes and costs.",
    )
    log_every: Positive = Field(10, description="Steps between two lines of metrics.")
    eval_every: Natural = Field(0, description="Steps between two evaluations; 0: only at the end.")
    eval_batches: Positive = Field(8, description="Global batches in one evaluation.")
    peak_tflops: PositiveFloat | None = Field(
        None, description="Peak 10^12 operations per second of one device, for MFU; default: known GPUs, else no MFU."
    )


class CheckpointConfig(Section):
    """What is saved and what a start resumes."""

    save_every: Natural = Field(0, description="Steps between two checkpoints; 0: only at the end and on a signal.")
    background: bool = Field(
        True, description="Copy the state to host memory and write it while training goes on; false: wait for the disk."
    )
    keep_last: Natural = Field(0, description="How many of the newest checkpoints stay; 0: all.")
    keep_every: Natural = Field(
        0, description="With keep_last: checkpoints of steps divisible by it stay, too; 0: none."
    )
    max_failures: Positive = Field(
        3, description="Saves that may fail one after the other before the run ends; after fewer it goes on."
    )
    resume: Literal["auto", "never", "restart"] = Field(
        "auto",
        description="auto: go on from the newest whole checkpoint of the run folder. never: refuse one that has any. "
        "restart: set what is there aside and begin at step 0 (for the command line: each start would do it again).",
    )
    load: PathText | None = Field(
        None, description="A checkpoint folder (step-…) of another run to start from when the run folder has none."
    )
    load_what: Literal["weights", "weights_and_optimizer", "all"] = Field(
        "all",
        description="What load brings. all: the run goes on at the checkpoint's step and place in the data. weights, "
        "weights_and_optimizer: a second phase, which begins at step 0 with data, sequences and schedule of its own. "
        "The vocabulary may have more rows than the checkpoint's.",
    )


class ResolvedParallel(ParallelConfig):
    """A layout whose ranks are known."""

    dp: Positive


class RunConfig(Section):
    """The whole file."""

    name: RunName = Field("run", description="Name of the run.")
    folder: PathText = Field("runs", description="Where run folders are made; this run's is folder/name.")
    model: ModelConfig = ModelConfig()
    parallel: ParallelConfig = ParallelConfig()
    precision: PrecisionConfig = PrecisionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    offload: OffloadConfig = OffloadConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    deepspeed: dict[str, Any] = Field(
        default_factory=dict,
        description="Extra DeepSpeed keys (communication and profiling only); those that are derived are refused.",
    )


class ResolvedRun(RunConfig):
    """A run with nothing left open, for a number of ranks (``derive.resolve``)."""

    model: ModelSpec
    parallel: ResolvedParallel
