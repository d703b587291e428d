"""``config.json`` of a Hugging Face model to and from the model's config here."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from megatrain.checkpoint.convert.errors import ConversionError
from megatrain.checkpoint.convert.families.family import Family
from megatrain.checkpoint.convert.families.gpt2 import GPT2
from megatrain.checkpoint.convert.families.llama import LLAMA
from megatrain.checkpoint.convert.families.mixtral import MIXTRAL
from megatrain.checkpoint.convert.families.qwen3 import QWEN3
from megatrain.checkpoint.convert.families.qwen3_moe import QWEN3_MOE
from megatrain.config.derive import expert_hidden_size, mixture_layers, num_tokens, original_length, resolve_model
from megatrain.config.schema import ModelConfig

FAMILIES = (GPT2, LLAMA, QWEN3, MIXTRAL, QWEN3_MOE)

# kind of RoPE scaling -> its field elsewhere -> (field here, what holds where it is left out)
ROPE: dict[str, dict[str, tuple[str, Any]]] = {
    "linear": {"factor": ("rope_scaling_factor", 1.0)},
    "dynamic": {"factor": ("rope_scaling_factor", 1.0)},
    "llama3": {
        "factor": ("rope_scaling_factor", 1.0),
        "low_freq_factor": ("rope_low_freq_factor", 1.0),
        "high_freq_factor": ("rope_high_freq_factor", 4.0),
        "original_max_position_embeddings": ("rope_original_max_seq_len", None),
    },
    "yarn": {
        "factor": ("rope_scaling_factor", None),
        "beta_fast": ("rope_beta_fast", 32.0),
        "beta_slow": ("rope_beta_slow", 1.0),
        "attention_factor": ("rope_attention_factor", None),
        "original_max_position_embeddings": ("rope_original_max_seq_len", None),
    },
    "longrope": {
        "factor": ("rope_scaling_factor", None),
        "short_factor": ("rope_short_factors", None),
        "long_factor": ("rope_long_factors", None),
        "attention_factor": ("rope_attention_factor", None),
        "original_max_position_embeddings": ("rope_original_max_seq_len", None),
    },
}
_ROPE_NAMES = ("rope_theta", "rope_type", "type")
_YARN_SIZES = ("mscale", "mscale_all_dim")  # DeepSeek's way to say what attention_factor says
# what says how a model is trained, stored or computed, and not what it computes
NOT_COMPARED = (
    "dropout",
    "attention_dropout",
    "document_attention",
    "vocab_size",
    "vocab_padding",
    "router_balance_loss",
    "router_z_loss",
)


def family_of_config(config: Mapping[str, Any]) -> Family:
    """The family that a ``config.json`` names.

    Raises:
        ConversionError: it is not known here.
    """
    model_type = config.get("model_type")
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise ConversionError(f"config.json: model_type {model_type!r} is not known; these are: {known}")


def family_of_model(model: ModelConfig) -> Family:
    """The family elsewhere of a model here.

    Raises:
        ConversionError: there is none.
    """
    for family in FAMILIES:
        if family.ours == model.family and family.experts == bool(model.num_experts):
            return family
    raise ConversionError(f"no family elsewhere is a mixture of experts of the family {model.family}")


def model_from_config(config: Mapping[str, Any], vocab_multiple: int = 1) -> ModelConfig:
    """The resolved model config of a ``config.json``.

    Args:
        vocab_multiple: the vocabulary is padded to a multiple of it.
    Raises:
        ConversionError: a setting that is not computed here; all are named.
    """
    family = family_of_config(config)
    problems = [
        f"{name} = {config[name]!r} is not computed here; this is: {allowed[0]!r}"
        for name, allowed in family.fixed.items()
        if config.get(name, allowed[0]) not in allowed
    ]
    if problems:
        raise ConversionError("config.json: " + "; ".join(problems))
    values = {
        ours: config.get(theirs, config.get(family.aliases.get(theirs, theirs), default))
        for theirs, (ours, default) in family.fields.items()
    }
    if family.ours != "gpt":
        values |= _rope_from_config(config, family.rope_theta, values["max_seq_len"])
    if family.dense_blocks is not None:
        values["num_dense_layers"] = max(config.get(family.dense_blocks) or [-1]) + 1
    values["vocab_padding"] = -values["vocab_size"] % vocab_multiple
    values["vocab_size"] += values["vocab_padding"]
    try:
        model = resolve_model(ModelConfig(family=family.ours, **values))  # type: ignore[arg-type]
    except ValidationError as error:
        raise ConversionError(f"config.json: {error}") from error
    if family.dense_blocks is not None:
        _require_computed_blocks(family.dense_blocks, config.get(family.dense_blocks) or [], model)
    return model


def config_from_model(model: ModelConfig) -> dict[str, Any]:
    """The ``config.json`` of a resolved model, in the spelling that transformers 4 and 5 both read.

    Raises:
        ConversionError: the family elsewhere has no such model; every field in the way is named.
    """
    family, model = family_of_model(model), _with_expert_size(model)
    config: dict[str, Any] = {"model_type": family.model_type, "architectures": [family.architecture]}
    config |= {theirs: getattr(model, ours) for theirs, (ours, _) in family.fields.items()}
    config["vocab_size"] = num_tokens(model)
    config |= {name: values[0] for name, values in family.fixed.items()}
    if family.dense_blocks is not None:
        config[family.dense_blocks] = list(range(model.num_dense_layers))
    if family.ours != "gpt":
        config |= {"rope_theta": model.rope_theta, "rope_scaling": _rope_to_config(model)}
    if model.rope_scaling == "dynamic":
        config["max_position_embeddings"] = original_length(model)
    if different := list(differences(model, model_from_config(config))):
        raise ConversionError(f"{family.architecture} cannot be this model: " + "; ".join(different))
    return config


def differences(one: ModelConfig, other: ModelConfig) -> Iterator[str]:
    """Fields in which two models compute differently; padding and dropout are not part of that."""
    one, other = _with_expert_size(one), _with_expert_size(other)
    if num_tokens(one) != num_tokens(other):
        yield f"vocabulary: {num_tokens(one)} and {num_tokens(other)} tokens"
    unused = {ours for kind in ROPE.values() for ours, _ in kind.values()}
    unused -= {ours for ours, _ in ROPE.get(one.rope_scaling, {}).values()}
    if one.rope_scaling == "dynamic":
        unused.remove("rope_original_max_seq_len")
    if len(mixture_layers(one)) == one.num_layers:
        unused.add("ffn_hidden_size")
    for name, value in one.model_dump().items():
        if name not in (*NOT_COMPARED, *unused) and value != getattr(other, name):
            yield f"{name}: {value!r} and {getattr(other, name)!r}"


def _require_computed_blocks(field: str, dense: list[int], model: ModelConfig) -> None:
    """Dense blocks are the first ones here, and those between the blocks of an interval."""
    wanted = {i for i in range(model.num_layers) if i not in dense and (i + 1) % model.expert_interval == 0}
    if not wanted or wanted != set(mixture_layers(model)):
        raise ConversionError(
            f"config.json: {field} = {dense}: blocks without experts are computed here where they are the first ones, "
            f"or all but every {model.expert_interval}. (decoder_sparse_step)"
        )


def _with_expert_size(model: ModelConfig) -> ModelConfig:
    size = expert_hidden_size(model) if model.num_experts else None
    return model.model_copy(update={"expert_hidden_size": size})


def _rope_from_config(config: Mapping[str, Any], default: float, length: int) -> dict[str, Any]:
    """Both spellings: ``rope_theta`` and ``rope_scaling`` (transformers 4), ``rope_parameters`` (5).

    ``length``: ``max_position_embeddings``, which is the original length where scaling is dynamic.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = given.get("rope_type", given.get("type", "default"))
    values = {"rope_theta": given.get("rope_theta", config.get("rope_theta", default))}
    if kind == "default":
        return values
    if kind not in ROPE:
        raise ConversionError(f"config.json: RoPE scaling {kind!r} is not computed here; these are: {', '.join(ROPE)}")
    known = (*ROPE[kind], *_ROPE_NAMES, *(_YARN_SIZES if kind == "yarn" else ()))
    if unknown := sorted(name for name in given if name not in known and given[name] is not None):
        raise ConversionError(f"config.json: fields of RoPE scaling {kind} that are not known: {', '.join(unknown)}")
    scaling = {ours: given.get(theirs, default) for theirs, (ours, default) in ROPE[kind].items()}
    if kind == "dynamic":
        scaling |= {"rope_original_max_seq_len": length, "max_seq_len": int(length * scaling["rope_scaling_factor"])}
    if kind in ("yarn", "longrope") and scaling["rope_scaling_factor"] is None:
        scaling["rope_scaling_factor"] = length / (scaling["rope_original_max_seq_len"] or length)
    if all(given.get(name) for name in _YARN_SIZES) and scaling["rope_attention_factor"] is None:
        scaling["rope_attention_factor"] = _yarn_size(scaling["rope_scaling_factor"], given)
    return values | {"rope_scaling": kind} | scaling


def _yarn_size(factor: Any, given: Mapping[str, Any]) -> float:
    """Of turned queries and keys: YaRN's own (Peng et al. 2023, eq. 15) with its logarithm weighed by ``mscale``, over
    the same weighed by ``mscale_all_dim``, as DeepSeek's configs have it and transformers computes it."""
    try:
        logarithm = math.log(max(float(factor), 1.0))
        numerator, denominator = (0.1 * float(given[name]) * logarithm + 1.0 for name in _YARN_SIZES)
    except (TypeError, ValueError) as error:
        raise ConversionError(f"config.json: factor, {' and '.join(_YARN_SIZES)} of YaRN: {error}") from error
    return numerator / denominator


def _rope_to_config(model: ModelConfig) -> dict[str, Any] | None:
    if model.rope_scaling == "none":
        return None
    scaling = {theirs: getattr(model, ours) for theirs, (ours, _) in ROPE[model.rope_scaling].items()}
    return {"rope_type": model.rope_scaling} | {name: value for name, value in scaling.items() if value is not None}
