"""Rotary positions in a ``config.json``, to and from the fields of the model's config here."""

import math
from collections.abc import Mapping
from typing import Any

from megatrain.convert.errors import ConversionError
from megatrain.spec.keys import flat
from megatrain.spec.schema import ModelSpec

# kind of RoPE scaling -> its field elsewhere -> (field here, what holds where it is left out)
ROPE: dict[str, dict[str, tuple[str, Any]]] = {
    "linear": {"factor": ("rope.factor", 1.0)},
    "dynamic": {"factor": ("rope.factor", 1.0)},
    "llama3": {
        "factor": ("rope.factor", 1.0),
        "low_freq_factor": ("rope.low_freq_factor", 1.0),
        "high_freq_factor": ("rope.high_freq_factor", 4.0),
        "original_max_position_embeddings": ("rope.original_max_seq_len", None),
    },
    "yarn": {
        "factor": ("rope.factor", None),
        "beta_fast": ("rope.beta_fast", 32.0),
        "beta_slow": ("rope.beta_slow", 1.0),
        "attention_factor": ("rope.attention_factor", None),
        "original_max_position_embeddings": ("rope.original_max_seq_len", None),
    },
    "longrope": {
        "factor": ("rope.factor", None),
        "short_factor": ("rope.short_factors", None),
        "long_factor": ("rope.long_factors", None),
        "attention_factor": ("rope.attention_factor", None),
        "original_max_position_embeddings": ("rope.original_max_seq_len", None),
    },
}
_ORIGINAL = "original_max_position_embeddings"
_SHARE = "partial_rotary_factor"
_YARN_SIZES = ("mscale", "mscale_all_dim")  # DeepSeek's way to say what attention_factor says
_NAMES = ("rope_theta", "rope_type", "type")
# fields that transformers doesn't look at: the formula has no original length; how a model came about
_WITHOUT_EFFECT = {
    "default": tuple(name for fields in ROPE.values() for name in fields),
    "linear": (_ORIGINAL,),
    "dynamic": (_ORIGINAL,),
}
_NOTES = ("finetuned",)


def rope_from_config(config: Mapping[str, Any], default: float, length: int) -> dict[str, Any]:
    """Fields of the model by dotted keys. Both spellings are read: ``rope_theta``, ``rope_scaling`` (transformers 4),
    ``rope_parameters`` (5).

    ``length``: ``max_position_embeddings``, which is the original length where scaling is dynamic. An original length
    beside these sections counts before one in them, as transformers has it.

    Raises:
        ConversionError: a scaling or a field of one that is not computed here.
    """
    given = _section(config)
    kind = _given(given, "rope_type", _given(given, "type", "default"))
    values = {"rope.theta": _number(_given(given, "rope_theta", _given(config, "rope_theta", default)), "rope_theta")}
    for place in (given, config):
        if _given(place, _SHARE, 1.0) != 1.0:
            raise ConversionError(f"config.json: {_SHARE} = {place[_SHARE]!r} is not computed here; this is: 1.0")
    _require_known(kind, given)
    if kind == "default":
        return values
    scaling = {ours: _given(given, theirs, default) for theirs, (ours, default) in ROPE[kind].items()}
    if _ORIGINAL in ROPE[kind] and config.get(_ORIGINAL) is not None:
        scaling["rope.original_max_seq_len"] = config[_ORIGINAL]
    for name in ("rope.factor", "rope.original_max_seq_len"):
        if scaling.get(name) is not None:
            _number(scaling[name], name)
    if kind == "dynamic":
        scaling |= {"rope.original_max_seq_len": length, "max_seq_len": int(length * scaling["rope.factor"])}
    if kind in ("yarn", "longrope") and scaling["rope.factor"] is None:
        scaling["rope.factor"] = length / (scaling["rope.original_max_seq_len"] or length)
    if kind == "yarn" and all(given.get(name) for name in _YARN_SIZES) and scaling["rope.attention_factor"] is None:
        scaling["rope.attention_factor"] = _yarn_size(scaling["rope.factor"], given)
    return values | {"rope.scaling": kind} | scaling


def rope_to_config(model: ModelSpec) -> dict[str, Any] | None:
    """The section ``rope_scaling`` of a model; None where nothing is stretched."""
    if model.rope.scaling == "none":
        return None
    fields = flat(model.model_dump())
    scaling = {theirs: fields[ours] for theirs, (ours, _) in ROPE[model.rope.scaling].items()}
    return {"rope_type": model.rope.scaling} | {name: value for name, value in scaling.items() if value is not None}


def _section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """``rope_scaling`` counts before ``rope_parameters`` where both are there."""
    for name in ("rope_scaling", "rope_parameters"):
        section = config.get(name)
        if section is not None and not isinstance(section, dict):
            raise ConversionError(f"config.json: {name} is not a section: {section!r:.100}")
        if section:
            return section
    return {}


def _require_known(kind: Any, given: Mapping[str, Any]) -> None:
    """Checks that the scaling and all that is said of it is computed here.

    Raises:
        ConversionError: names what is not.
    """
    if kind != "default" and (not isinstance(kind, str) or kind not in ROPE):
        known = ", ".join(("default", *ROPE))
        raise ConversionError(f"config.json: RoPE scaling {kind!r:.100} is not computed here; these are: {known}")
    known_fields = (*ROPE.get(kind, ()), *_NAMES, _SHARE, *_WITHOUT_EFFECT.get(kind, ()), *_NOTES)
    if kind == "yarn":
        known_fields += _YARN_SIZES
        if given.get("truncate", True) not in (True, None):
            raise ConversionError("config.json: truncate = False of YaRN is not computed here; this is: True")
        known_fields += ("truncate",)
    if unknown := sorted(str(name) for name in given if name not in known_fields and given[name] is not None):
        raise ConversionError(f"config.json: fields of RoPE scaling {kind} that are not known: {', '.join(unknown)}")


def _given(section: Mapping[str, Any], name: str, default: Any) -> Any:
    """A field; null is as good as none."""
    value = section.get(name)
    return default if value is None else value


def _number(value: Any, name: str) -> Any:
    """``value``, checked to be a positive number of a size that one can compute with.

    Raises:
        ConversionError: it isn't.
    """
    if type(value) not in (int, float) or not 0 < value < 1e15:
        raise ConversionError(f"config.json: {name} = {value!r:.100} is not a positive number")
    return value


def _yarn_size(factor: Any, given: Mapping[str, Any]) -> float:
    """The size of turned queries and keys: YaRN's own (Peng et al. 2023, eq. 15) with its logarithm weighed by
    ``mscale``, over the same weighed by ``mscale_all_dim``, as DeepSeek's configs have it and transformers
    computes it."""
    try:
        logarithm = math.log(max(float(factor), 1.0))
        numerator, denominator = (0.1 * float(given[name]) * logarithm + 1.0 for name in _YARN_SIZES)
        return numerator / denominator
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ConversionError(f"config.json: factor, {' and '.join(_YARN_SIZES)} of YaRN: {error}") from error
