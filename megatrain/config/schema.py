"""What a run is: every field that a user may set, with its type, unit and default.

Pure data: rules between fields stand in ``rules``, computed values in ``derive``.
Names follow the field's usual terms: ``tp cp pp dp ep`` are the axes of the mesh, ``num_*`` are
counts, sizes are in elements unless the description gives a unit.
"""

from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from megatrain.config.schema_optimizer import OffloadConfig, OptimizerConfig, ScheduleConfig
from megatrain.spec.section import (
    Name,
    Natural,
    PathText,
    Positive,
    PositiveFloat,
    Probability,
    RunName,
    Section,
    Weight,
)

__all__ = ["OffloadConfig", "OptimizerConfig", "ScheduleConfig"]


class ModelConfig(Section):
    """Shape of the Transformer."""

    family: Literal["gpt", "llama", "qwen3"] = Field(
        "llama",
        description="gpt: learned positions, LayerNorm, GELU, biases, tied embeddings. "
        "llama: rotary positions, RMSNorm, SwiGLU, no biases, untied embeddings. "
        "qwen3: llama with a norm on each head's queries and keys.",
    )
    num_layers: Positive = Field(4, le=10_000, description="Transformer blocks.")
    hidden_size: Positive = Field(256, description="Width D of the residual stream.")
    num_heads: Positive = Field(8, description="Query heads H; must divide hidden_size where head_width is not set.")
    num_kv_heads: Positive | None = Field(
        None, description="Key/value heads (grouped-query attention); default: num_heads."
    )
    head_width: Positive | None = Field(None, description="Width K of a head; default: hidden_size / num_heads.")
    attention_bias: bool | None = Field(
        None, description="Biases in the attention's matrices; default: true for gpt, false for the others."
    )
    ffn_hidden_size: Positive | None = Field(
        None,
        description="Width F of the feed-forward layer; default: 4 D (gpt), "
        "8/3 D rounded up to a multiple of 64 (the others).",
    )
    num_experts: Positive | None = Field(
        None, description="Experts E of each mixture-of-experts block; default: none, the model is dense."
    )
    experts_per_token: Positive = Field(2, description="Routed experts that each token passes (top-k).")
    expert_hidden_size: Positive | None = Field(
        None, description="Width F of an expert, which has no biases; default: ffn_hidden_size."
    )
    num_shared_experts: Natural = Field(0, description="Experts that every token passes; one feed-forward so wide.")
    num_dense_layers: Natural = Field(0, description="First blocks that have a dense feed-forward instead of experts.")
    expert_interval: Positive = Field(
        1, description="n: of every n blocks, counted from the first, only the last has experts; the others are dense."
    )
    expert_capacity: Weight | None = Field(
        None,
        description="Choices that an expert takes of one sequence, as a multiple of its even share; what comes later "
        "in the sequence is dropped. Default: no limit (dropless).",
    )
    router_score: Literal["softmax", "sigmoid"] = Field("softmax", description="How the router scores the experts.")
    router_normalize: bool = Field(True, description="Divide the gates of a token by their sum.")
    router_scale: PositiveFloat = Field(1.0, description="Factor on the gates.")
    router_groups: Positive = Field(1, description="Groups G of neighbouring experts; must divide num_experts.")
    router_groups_per_token: Positive = Field(
        1, description="Groups that a token may choose its experts from: those whose two best add up highest."
    )
    router_balance_loss: Weight = Field(
        0.01, description="Weight of the auxiliary load-balancing loss, counted over each sequence."
    )
    router_z_loss: Weight = Field(0.0, description="Weight of the square of the logits' log-sum-exp.")
    router_balance_rate: Weight = Field(
        0.0, description="Step of the balance bias, which moves the choice of experts without a loss; 0: no bias."
    )
    vocab_size: Positive = Field(8192, description="Rows V of the embedding; must be divisible by parallel.tp.")
    vocab_padding: Natural = Field(
        0,
        description="Rows at the end of the embedding that stand for no token: they take no part in the softmax, "
        "so a vocabulary made divisible gives the same numbers.",
    )
    max_seq_len: Positive = Field(1024, description="Longest sequence that the positions are made for.")
    tie_embeddings: bool | None = Field(
        None, description="Use the word embedding as the output head; default: true for gpt, false for the others."
    )
    norm_eps: PositiveFloat = Field(1e-5, description="Epsilon inside the square root of the norms.")
    rope_theta: PositiveFloat = Field(10000.0, description="Base of the rotary frequencies (llama, qwen3).")
    rope_scaling: Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope"] = Field(
        "none", description="How the rotary frequencies are stretched for sequences longer than those first trained on."
    )
    rope_scaling_factor: Annotated[float, Field(ge=1.0)] = Field(
        1.0,
        description="Stretch of the low rotary frequencies (linear: of all; dynamic: of the lowest, in a sequence of "
        "twice the original length, less 1; longrope: of the longest sequence).",
    )
    rope_original_max_seq_len: Positive | None = Field(
        None, description="All but linear: longest sequence before the stretch; default: max_seq_len."
    )
    rope_short_factors: list[PositiveFloat] | None = Field(
        None, description="longrope: stretch of each of the K/2 frequencies in sequences up to the original length."
    )
    rope_long_factors: list[PositiveFloat] | None = Field(None, description="longrope: the same in longer sequences.")
    rope_low_freq_factor: PositiveFloat = Field(
        1.0, description="llama3: a frequency with fewer turns than this in the original length is stretched in full."
    )
    rope_high_freq_factor: PositiveFloat = Field(
        4.0, description="llama3: a frequency with more turns than this stays as it is."
    )
    rope_beta_fast: PositiveFloat = Field(32.0, description="yarn: a frequency with more turns stays as it is.")
    rope_beta_slow: PositiveFloat = Field(1.0, description="yarn: one with fewer turns is stretched in full.")
    rope_attention_factor: PositiveFloat | None = Field(
        None, description="yarn, longrope: factor on turned queries and keys; default: by rope_scaling_factor."
    )
    init_std: PositiveFloat = Field(0.02, description="Standard deviation of the initial weights.")
    dropout: Probability = Field(0.0, description="Dropout of embeddings and of each sublayer's output.")
    attention_dropout: Probability = Field(0.0, description="Dropout of the attention probabilities.")
    document_attention: Literal["dense", "per_document", "flex", "varlen"] = Field(
        "dense",
        description="How attention stays inside documents (data.sequences mask_documents and pack_documents). dense: a "
        "mask of all pairs, in every layout. per_document: one document after the other, no work for other pairs; for "
        "CPUs and long documents. flex, varlen: FlexAttention, or FlashAttention's kernel for many lengths (GPUs).",
    )


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
