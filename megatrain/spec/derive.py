"""Values of a model that follow from others.

Letters as in the models: D width, H query heads, K head width, F feed-forward width.
"""

import math

from megatrain.spec.schema import ModelConfig

_FFN_MULTIPLE = 64  # whole tiles of a matrix unit, and room for tensor parallelism


def resolve_model(model: ModelConfig) -> ModelConfig:
    """``model`` with its derived fields filled in."""
    tied = model.family == "gpt" if model.tie_embeddings is None else model.tie_embeddings
    update = {
        "num_kv_heads": model.num_kv_heads or model.num_heads,
        "head_width": head_width(model),
        "attention_bias": attention_bias(model),
        "ffn_hidden_size": ffn_hidden_size(model),
        "tie_embeddings": tied,
    }
    return model.model_copy(update=update)


def ffn_hidden_size(model: ModelConfig) -> int:
    """F: as set, else 4 D (gpt) or 8/3 D rounded up to a multiple of 64 (the others).

    SwiGLU has three matrices where GELU has two, so 8/3 D keeps the parameters of 4 D (Shazeer 2020).
    """
    if model.ffn_hidden_size is not None:
        return model.ffn_hidden_size
    if model.family == "gpt":
        return 4 * model.hidden_size
    return math.ceil(8 * model.hidden_size / (3 * _FFN_MULTIPLE)) * _FFN_MULTIPLE


def head_width(model: ModelConfig) -> int:
    """K: columns of one attention head."""
    return model.head_width or model.hidden_size // model.num_heads


def original_length(model: ModelConfig) -> int:
    """Longest sequence before the rotary frequencies were stretched."""
    return model.rope_original_max_seq_len or model.max_seq_len


def mixture_layers(model: ModelConfig) -> range:
    """Blocks that have experts."""
    if not model.num_experts:
        return range(0)
    every = model.expert_interval
    first = -(-(model.num_dense_layers + 1) // every) * every - 1
    return range(first, model.num_layers, every)


def expert_hidden_size(model: ModelConfig) -> int:
    """F of one expert."""
    return model.expert_hidden_size or ffn_hidden_size(model)


def attention_bias(model: ModelConfig) -> bool:
    """Whether the attention's matrices have biases."""
    return model.family == "gpt" if model.attention_bias is None else model.attention_bias


def num_tokens(model: ModelConfig) -> int:
    """Tokens of the vocabulary, without the padding rows."""
    return model.vocab_size - model.vocab_padding
