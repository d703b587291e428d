"""``config.json`` of a Hugging Face model to and from the model's config here."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from megatrain.convert.errors import ConversionError
from megatrain.convert.families.bert import BERT
from megatrain.convert.families.family import Family
from megatrain.convert.families.gpt2 import GPT2
from megatrain.convert.families.llama import LLAMA
from megatrain.convert.families.mistral import MISTRAL
from megatrain.convert.families.mixtral import MIXTRAL
from megatrain.convert.families.qwen3 import QWEN3
from megatrain.convert.families.qwen3_moe import QWEN3_MOE
from megatrain.convert.huggingface.rope import ROPE, rope_from_config, rope_to_config
from megatrain.convert.model_check import resolved, said
from megatrain.spec.derive import mixture_layers, num_tokens
from megatrain.spec.keys import flat, nested
from megatrain.spec.schema import ModelConfig, ModelSpec

FAMILIES = (BERT, GPT2, LLAMA, MISTRAL, QWEN3, MIXTRAL, QWEN3_MOE)

# what says how a model is trained, stored or computed, and not what it computes
NOT_COMPARED = (
    "dropout",
    "attention.dropout",
    "attention.documents",
    "vocab_size",
    "vocab_padding",
    "router.balance_loss",
    "router.z_loss",
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
    raise ConversionError(f"config.json: model_type {model_type!r:.100} is not known; these are: {known}")


def family_of_model(model: ModelSpec) -> Family:
    """The family elsewhere of a model here.

    Raises:
        ConversionError: there is none.
    """
    for family in FAMILIES:
        if family.ours == model.family and family.experts == bool(model.experts.num_experts):
            return family
    raise ConversionError(f"no family elsewhere is a mixture of experts of the family {model.family}")


def model_from_config(config: Mapping[str, Any], vocab_multiple: int = 1) -> ModelSpec:
    """The resolved model config of a ``config.json``.

    Args:
        vocab_multiple: the vocabulary is padded to a multiple of it.
    Raises:
        ConversionError: a setting that is not computed here (all are named), or that is none at all.
    """
    family = family_of_config(config)
    _require_computed(family, config)
    values = {ours: _value(family, config, theirs) for theirs, (ours, _) in family.fields.items()}
    for name in ("vocab_size", "max_seq_len", "num_layers"):
        if type(values[name]) is not int or not 1 <= values[name] < 2**40:
            theirs = next(field for field, (ours, _) in family.fields.items() if ours == name)
            raise ConversionError(f"config.json: {theirs} = {values[name]!r:.100} is not a positive whole number")
    if family.is_rotary:
        values |= rope_from_config(config, family.rope_theta, values["max_seq_len"])
    if family.window is not None:
        values |= _windows(config, *family.window)
    dense = _dense_blocks(family, config, values["num_layers"])
    if dense:
        values["experts.num_dense_layers"] = max(dense) + 1
    values["vocab_padding"] = -values["vocab_size"] % vocab_multiple
    values["vocab_size"] += values["vocab_padding"]
    try:
        described = ModelConfig.model_validate(nested({"family": family.ours, **values}))
    except ValidationError as error:
        raise ConversionError(f"config.json: {said(error, _their_names(family))}") from error
    model = resolved(described, "config.json")
    if family.dense_blocks is not None:
        _require_computed_blocks(family.dense_blocks, dense, model)
    return model


def config_from_model(model: ModelSpec) -> dict[str, Any]:
    """The ``config.json`` of a resolved model, in the spelling that transformers 4 and 5 both read.

    Raises:
        ConversionError: the family elsewhere has no such model; every field in the way is named.
    """
    family, fields = family_of_model(model), flat(model.model_dump())
    config: dict[str, Any] = {"model_type": family.model_type, "architectures": [family.architecture]}
    config |= {theirs: fields[ours] for theirs, (ours, _) in family.fields.items()}
    config["vocab_size"] = num_tokens(model)
    config |= {name: values[0] for name, values in family.fixed.items()}
    if family.window is not None:
        config[family.window[0]] = model.attention.window if "window" in model.blocks else None
    if family.dense_blocks is not None:
        config[family.dense_blocks] = list(range(model.experts.num_dense_layers))
    if model.positions.kind == "rotary":
        config |= {"rope_theta": model.rope.theta, "rope_scaling": rope_to_config(model)}
    if model.rope.scaling == "dynamic":
        config["max_position_embeddings"] = model.rope.original_max_seq_len
    if different := list(differences(model, model_from_config(config))):
        raise ConversionError(f"{family.architecture} cannot be this model: " + "; ".join(different))
    return config


def differences(one: ModelSpec, other: ModelSpec) -> Iterator[str]:
    """Fields in which two models compute differently; padding and dropout are not part of that."""
    if num_tokens(one) != num_tokens(other):
        yield f"vocabulary: {num_tokens(one)} and {num_tokens(other)} tokens"
    unused = {ours for kind in ROPE.values() for ours, _ in kind.values()}
    unused -= {ours for ours, _ in ROPE.get(one.rope.scaling, {}).values()}
    if one.rope.scaling == "dynamic":
        unused.remove("rope.original_max_seq_len")
    if len(mixture_layers(one)) == one.num_layers:
        unused.add("feed_forward.hidden_size")
    if "window" not in one.blocks:
        unused.add("attention.window")
    if not one.experts.num_experts:
        unused.add("experts.hidden_size")
    others = flat(other.model_dump())
    for name, value in flat(one.model_dump()).items():
        if name not in (*NOT_COMPARED, *unused) and value != others[name]:
            yield f"{name}: {value!r} and {others[name]!r}"


def _require_computed(family: Family, config: Mapping[str, Any]) -> None:
    """Checks the fields that change the arithmetic, or what the weights mean.

    Raises:
        ConversionError: names all whose values are not computed here.
    """
    problems = [
        f"{name} = {config[name]!r:.100} is not computed here; this is: {allowed[0]!r}"
        for name, allowed in family.fixed.items()
        if not any(config.get(name, allowed[0]) is one or config.get(name, allowed[0]) == one for one in allowed)
    ]
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        problems.append(f"layer_types = {kinds!r:.100} is not computed here; this is: 'full_attention' in every block")
    if config.get("quantization_config"):
        problems.append("quantization_config: the weights are quantized, and are not read: dequantize the model first")
    if problems:
        raise ConversionError("config.json: " + "; ".join(problems))


def _value(family: Family, config: Mapping[str, Any], theirs: str) -> Any:
    return config.get(theirs, config.get(family.aliases.get(theirs, theirs), family.fields[theirs][1]))


def _windows(config: Mapping[str, Any], field: str, default: int) -> dict[str, Any]:
    """The kinds of the blocks, by dotted keys."""
    window = config.get(field, default)
    return {"blocks": ["full"]} if window is None else {"blocks": ["window"], "attention.window": window}


def _their_names(family: Family) -> dict[str, str]:
    return {ours: theirs for theirs, (ours, _) in family.fields.items()} | {
        ours: theirs for kind in ROPE.values() for theirs, (ours, _) in kind.items()
    }


def _dense_blocks(family: Family, config: Mapping[str, Any], num_layers: int) -> list[int]:
    """Numbers of the blocks that the config names as dense ones.

    Raises:
        ConversionError: they are no numbers of blocks.
    """
    dense = (config.get(family.dense_blocks) if family.dense_blocks else None) or []
    if not isinstance(dense, list) or not all(type(block) is int and 0 <= block < num_layers for block in dense):
        raise ConversionError(f"config.json: {family.dense_blocks} = {dense!r:.100} does not list numbers of blocks")
    return dense


def _require_computed_blocks(field: str, dense: list[int], model: ModelSpec) -> None:
    """Dense blocks are the first ones here, and those between the blocks of an interval."""
    wanted = {i for i in range(model.num_layers) if i not in dense and (i + 1) % model.experts.interval == 0}
    if not wanted or wanted != set(mixture_layers(model)):
        raise ConversionError(
            f"config.json: {field} = {dense!r:.100}: blocks without experts are computed here where they are the first "
            f"ones, or all but every {model.experts.interval}. (decoder_sparse_step)"
        )
