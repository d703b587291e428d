"""Values of a model that follow from others.

Letters as in the models: D width, H query heads, K head width, F feed-forward width.
"""

import functools
import math
from typing import Any

from megatrain.spec.families import FAMILIES
from megatrain.spec.keys import nested
from megatrain.spec.schema import (
    AttentionSpec,
    BlockKind,
    ExpertsSpec,
    FeedForwardSpec,
    ModelConfig,
    ModelSpec,
    NormSpec,
    PositionsSpec,
    RopeSpec,
)

_FFN_MULTIPLE = 64  # whole tiles of a matrix unit, and room for tensor parallelism


def resolve_model(model: ModelConfig) -> ModelSpec:
    """``model`` with what it leaves open filled in, by its family's preset or by its other fields.

    Nothing is checked: rules look at models that do not fit together.
    """
    preset = nested({key: chosen(model, key) for key in FAMILIES[model.family].preset})
    derived = nested(
        {
            "attention.num_kv_heads": model.attention.num_kv_heads or model.attention.num_heads,
            "attention.head_width": head_width(model),
            "rope.original_max_seq_len": model.rope.original_max_seq_len or model.max_seq_len,
            "feed_forward.hidden_size": ffn_hidden_size(model),
            "experts.hidden_size": model.experts.hidden_size or ffn_hidden_size(model),
        }
    )

    def filled(name: str) -> dict[str, Any]:
        return dict(getattr(model, name)) | preset.get(name, {}) | derived.get(name, {})

    return ModelSpec.model_construct(
        **dict(model)
        | {
            **{name: preset[name] for name in ("blocks", "tie_embeddings", "head_transform")},
            "attention": AttentionSpec.model_construct(**filled("attention")),
            "positions": PositionsSpec.model_construct(**filled("positions")),
            "rope": RopeSpec.model_construct(**filled("rope")),
            "feed_forward": FeedForwardSpec.model_construct(**filled("feed_forward")),
            "norm": NormSpec.model_construct(**filled("norm")),
            "experts": ExpertsSpec.model_construct(**filled("experts")),
        }
    )


def chosen(model: ModelConfig, key: str) -> Any:
    """The value at a dotted key that families preset: as set, else the family's."""
    value = functools.reduce(getattr, key.split("."), model)
    return FAMILIES[model.family].preset[key] if value is None else value


def head_width(model: ModelConfig) -> int:
    """K: as set, else an equal part of the stream."""
    return model.attention.head_width or model.hidden_size // model.attention.num_heads


def ffn_hidden_size(model: ModelConfig) -> int:
    """F: as set, else 4 D (gelu) or 8/3 D rounded up to a multiple of 64 (swiglu).

    SwiGLU has three matrices where GELU has two, so 8/3 D keeps the parameters of 4 D (Shazeer 2020).
    """
    if model.feed_forward.hidden_size is not None:
        return model.feed_forward.hidden_size
    if chosen(model, "feed_forward.activation") == "swiglu":
        return math.ceil(8 * model.hidden_size / (3 * _FFN_MULTIPLE)) * _FFN_MULTIPLE
    return 4 * model.hidden_size


def block_kind(model: ModelSpec, layer: int) -> BlockKind:
    """What mixes the positions in a block."""
    return model.blocks[layer % len(model.blocks)]


def mixture_layers(model: ModelConfig) -> range:
    """Blocks that have experts."""
    experts = model.experts
    if not experts.num_experts:
        return range(0)
    every = experts.interval
    first = -(-(experts.num_dense_layers + 1) // every) * every - 1
    return range(first, model.num_layers, every)


def num_tokens(model: ModelConfig) -> int:
    """Tokens of the vocabulary, without the padding rows."""
    return model.vocab_size - model.vocab_padding
