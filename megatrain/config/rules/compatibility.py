"""Which features go together: one table, for validation, the page docs/compatibility.md, `plan.py --compat` and tests.

A setting is a field of the config with its values, or with classes of them (`>1` stands for every larger number).
Two values of two settings go together unless a refusal says why not; no refusal looks at more than two settings. A
field that does nothing without another (``cp_method`` without context ranks) is refused nothing there.
Rules that count (what divides what) stand in the modules beside it.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

from megatrain.config.pipeline_schedules import PIPELINE_SCHEDULES
from megatrain.config.schema import WHOLE_DOCUMENTS, RunConfig

CLASSES = {
    ">1": ("more than 1", "2 or more"),
    ">0": ("more than 0", "a positive number"),
    "number": ("set", "a number"),
    "null": ("not set", "null"),
    "one_length": ("of one sequence length", "stages without seq_len"),
    "shorter_first": ("of shorter sequences", "stages with seq_len"),
}
"""Values that stand for many: how a sentence says that a field has one, and that it should."""


@dataclass(frozen=True)
class Setting:
    """A field as a feature. ``name``: in questions; ``values``: all choices, or one value and the class of the rest.

    ``used_with``: another setting's name and its values, without which the field does nothing.
    """

    name: str
    key: str
    values: tuple[str, ...]
    used_with: tuple[str, tuple[str, ...]] | None = None

    @property
    def is_open(self) -> bool:
        """Whether the last value stands for all numbers that are not named."""
        return self.values[-1] in (">1", ">0", "number")

    def value_of(self, raw: Any) -> str:
        """The value of ``values`` that a config's ``raw`` value is or belongs to."""
        if isinstance(raw, list) and raw and isinstance(raw[0], str):  # kinds of blocks: the last that is among them
            return next(value for value in reversed(self.values) if value in raw)
        if isinstance(raw, list):  # the stages of a ramp
            return self.values[any(stage.seq_len is not None for stage in raw)]
        text = (
            str(raw).lower()
            if isinstance(raw, bool)
            else "null"
            if raw is None
            else f"{raw:g}"
            if _number(raw)
            else raw
        )
        return text if text in self.values else self.values[0 if raw is None else -1]


@dataclass(frozen=True)
class Refusal:
    """Any of ``values`` of ``setting`` with any of ``other_values`` of ``other``: does not work, for ``reason``."""

    setting: Setting
    values: tuple[str, ...]
    other: Setting
    other_values: tuple[str, ...]
    reason: str

    @cached_property
    def pairs(self) -> frozenset[frozenset[tuple[str, str]]]:
        """Every refused pair of (setting, value)."""
        return frozenset(
            frozenset({(self.setting.name, a), (self.other.name, b)}) for a in self.values for b in self.other_values
        )


def _number(raw: Any) -> bool:
    return isinstance(raw, int | float)


def _choices(key: str) -> tuple[str, ...]:
    """All values of a field that has a fixed number of them, as the schema names them."""
    kind: Any = RunConfig
    for name in key.split("."):
        kind = kind.model_fields[name].annotation
    return ("false", "true") if kind is bool else tuple(str(choice) for choice in get_args(kind))


def _settings(**settings: str | tuple[str, tuple[str, ...]]) -> dict[str, Setting]:
    pairs = {name: (field, _choices(field)) if isinstance(field, str) else field for name, field in settings.items()}
    return {name: Setting(name, key, values, _USED_WITH.get(name)) for name, (key, values) in pairs.items()}


_ZERO = "deepspeed.zero_optimization."
_OF_ZERO_3 = (
    *("sub_group_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"),
    *("stage3_max_live_parameters", "stage3_max_reuse_distance"),
)
_ONE, _NONE, _UNSET = ("1", ">1"), ("0", ">0"), ("null", "number")

_USED_WITH = {
    "document_attention": ("sequences", ("mask_documents", "pack_documents", "one_document")),
    "cp_method": ("cp", (">1",)),
    **dict.fromkeys(("router_score", "router_groups", "router_balance_rate"), ("num_experts", (">0",))),
    **dict.fromkeys(_OF_ZERO_3, ("zero_stage", ("3",))),
    "reduce_bucket_size": ("zero_stage", ("1", "2", "3")),
}

SETTINGS = _settings(
    family="model.family",
    dropout=("model.dropout", _NONE),
    attention_dropout=("model.attention.dropout", _NONE),
    document_attention="model.attention.documents",
    blocks=("model.blocks", ("full", "window", "bidirectional")),
    norm_placement=("model.norm.placement", ("pre", "post")),
    num_experts=("model.experts.num_experts", _NONE),
    expert_capacity=("model.experts.capacity", _UNSET),
    num_shared_experts=("model.experts.num_shared", _NONE),
    num_dense_layers=("model.experts.num_dense_layers", _NONE),
    expert_interval=("model.experts.interval", _ONE),
    router_score="model.router.score",
    router_groups=("model.router.groups", _ONE),
    router_balance_rate=("model.router.balance_rate", _NONE),
    sequences="data.sequences",
    eod_loss=("data.eod_loss", ("null", "false", "true")),
    objective="data.objective",
    ramp=("train.ramp", ("one_length", "shorter_first")),
    tp=("parallel.tp", _ONE),
    sequence_parallel="parallel.sequence_parallel",
    cp=("parallel.cp", _ONE),
    cp_method="parallel.cp_method",
    pp=("parallel.pp", _ONE),
    pp_schedule="parallel.pp_schedule",
    dp=("parallel.dp", _ONE),
    ep=("parallel.ep", _ONE),
    zero_stage="parallel.zero_stage",
    dtype="precision.dtype",
    gradient_dtype="precision.gradient_dtype",
    residual_dtype="precision.residual_dtype",
    logits_dtype="precision.logits_dtype",
    optimizer="optimizer.name",
    offload_optimizer="offload.optimizer",
    offload_parameters="offload.parameters",
    activation_checkpointing="train.activation_checkpointing",
    offload_activations="train.offload_activations",
    compile="train.compile",
    deterministic="train.deterministic",
    background="checkpoint.background",
    overlap_comm=(f"{_ZERO}overlap_comm", ("false", "true")),
    **{key: (f"{_ZERO}{key}", _UNSET) for key in ("reduce_bucket_size", *_OF_ZERO_3)},
)

_SPLIT = tuple(name for name, schedule in PIPELINE_SCHEDULES.items() if schedule.splits_backward)
_SEVERAL = tuple(name for name, schedule in PIPELINE_SCHEDULES.items() if not schedule.takes_stages(1))


def _refuse(
    setting: str, values: str | tuple[str, ...], other: str, other_values: str | tuple[str, ...], reason: str
) -> Refusal:
    listed, other_listed = (tuple(v.split()) if isinstance(v, str) else v for v in (values, other_values))
    first, second = SETTINGS[setting], SETTINGS[other]
    unknown = {*listed} - {*first.values} | {*other_listed} - {*second.values}
    assert not unknown, f"{setting} with {other}: no such value: {unknown}"
    return Refusal(first, listed, second, other_listed, reason)


REFUSALS = (
    _refuse(
        "document_attention", "per_document flex varlen", "attention_dropout", ">0",
        "the kernels that see one document at a time draw no dropout",
    ),
    _refuse(
        "document_attention", "per_document flex varlen", "cp_method", "all_gather",
        "it leaves a rank a part of the queries, and the kernels take whole sequences",
    ),
    _refuse(
        "document_attention", "per_document flex varlen", "compile", "true",
        "its work depends on the lengths of the documents, which a compiled block would be traced for anew",
    ),
    _refuse(
        "document_attention", "per_document flex varlen", "blocks", "window",
        "the kernels let a token see all of its document up to itself",
    ),
    _refuse(
        "document_attention", "per_document flex varlen", "blocks", "bidirectional",
        "the kernels let a token see its document up to itself, and none of what comes after",
    ),
    _refuse(
        "blocks", "bidirectional", "objective", "causal",
        "a token would see the one that comes next, which is its label",
    ),
    _refuse(
        "blocks", "full window", "objective", "masked",
        "a hidden token is to be told from what stands on both sides, and these blocks see what comes before alone",
    ),
    _refuse(
        "blocks", "bidirectional", "cp_method", "all_gather",
        "it gives a rank keys up to its queries alone, and these blocks see what comes after",
    ),
    _refuse(
        "norm_placement", "post", "residual_dtype", "fp32",
        "the stream is what a norm gives out, in the type of its weights, and no sum that runs through all blocks",
    ),
    _refuse("document_attention", "varlen", "dtype", "fp32", "FlashAttention computes in 16 bits"),
    _refuse(
        "eod_loss", "false true", "sequences", WHOLE_DOCUMENTS,
        "it has no effect, as the end of a whole document never has a loss",
    ),
    _refuse(
        "eod_loss", "false true", "objective", "masked",
        "it has no effect, as a token's label is the token itself and the end of a document is never one",
    ),
    _refuse("ramp", "shorter_first", "sequences", WHOLE_DOCUMENTS, "shorter sequences would cut the documents"),
    _refuse(
        "zero_stage", "2 3", "pp", ">1",
        "ZeRO-2 and ZeRO-3 partition gradients inside backward hooks, which a pipeline schedule's backward for several "
        "micro-batches does not go through",
    ),
    _refuse(
        "overlap_comm", "true", "zero_stage", "0 1",
        "gradients are summed when all micro-batches are done: only ZeRO 2 and 3 sum them inside the backward pass",
    ),
    _refuse(
        "zero_stage", "3", "ep", ">1",
        "ZeRO-3 shards every weight over all data-parallel ranks, and these hold different experts",
    ),
    _refuse("pp_schedule", _SEVERAL, "pp", "1", "it puts several pipeline stages on a rank, and there is no pipeline"),
    _refuse("sequence_parallel", "true", "tp", "1", "there are no ranks to split the sequence over"),
    _refuse("ep", ">1", "num_experts", "0", "a dense model has no experts to share"),
    *(
        _refuse(name, value, "num_experts", "0", "it is of a mixture of experts, and the model is dense")
        for name, value in (
            *(("expert_capacity", "number"), ("num_shared_experts", ">0")),
            *(("num_dense_layers", ">0"), ("expert_interval", ">1")),
        )
    ),
    _refuse(
        "activation_checkpointing", "full every_nth feed_forward budget", "pp_schedule", _SPLIT,
        "the schedule computes the gradients of inputs and of each weight apart, and the block would be computed again "
        "for every one of them",
    ),
    _refuse(
        "activation_checkpointing", "budget", "zero_stage", "3",
        "ZeRO-3 fetches and frees weights inside a block, differently when the block is computed again",
    ),
    _refuse(
        "compile", "true", "pp_schedule", _SPLIT,
        "the backward pass of a compiled block gives the gradients of inputs and weights at once",
    ),
    _refuse("optimizer", "adafactor muon", "zero_stage", "3", "ZeRO-3 updates pieces of matrices, not whole ones"),
    _refuse(
        "optimizer", "cpu_adamw", "offload_optimizer", "none",
        "it updates weights in host memory, and they are kept elsewhere",
    ),
    _refuse(
        "optimizer", "adafactor", "num_experts", ">0",
        "it scales a step by the size of the whole weight, and experts stand in one array that is spread over ranks",
    ),
    _refuse(
        "offload_optimizer", "cpu nvme", "optimizer", "adafactor muon", "it puts matrices together between GPUs",
    ),
    _refuse("offload_optimizer", "cpu nvme", "zero_stage", "0", "only a sharded state is moved"),
    _refuse("offload_optimizer", "nvme", "zero_stage", "1 2", "DeepSpeed writes only ZeRO-3's state to a disk"),
    _refuse(
        "offload_optimizer", "cpu nvme", "pp", ">1",
        "DeepSpeed sums gradients on the host inside backward hooks, which see a schedule's micro-batches as one",
    ),
    _refuse(
        "offload_parameters", "cpu nvme", "zero_stage", "0 1 2", "only ZeRO-3 fetches weights when they are used",
    ),
    _refuse("offload_parameters", "nvme", "dtype", "fp32", "DeepSpeed keeps weights that lie on a disk in 16 bits"),
)  # fmt: skip
