"""Megatron-core's GPT model: one table for every family, in the names of its layer specs with Transformer Engine.

Its rows of queries, keys and values stand group by group as here, and its vocabulary keeps the padding.
"""

from megatrain.checkpoint.convert.forms import GATE_UP
from megatrain.checkpoint.convert.table import Line, untied, with_attention_bias
from megatrain.config.schema import ModelConfig


def _gpt(model: ModelConfig) -> bool:
    return model.family == "gpt"


def _not_gpt(model: ModelConfig) -> bool:
    return model.family != "gpt"


def _head_norms(model: ModelConfig) -> bool:
    return model.family == "qwen3"


_QKV, _FC1 = "decoder.layers.{}.self_attention.linear_qkv", "decoder.layers.{}.mlp.linear_fc1"
MEGATRON_CORE = (
    Line("embedding.word.weight", "embedding.word_embeddings.weight"),
    Line("embedding.position.weight", "embedding.position_embeddings.weight", when=_gpt),
    Line("layers.{}.attention_norm.weight", f"{_QKV}.layer_norm_weight"),
    Line("layers.{}.attention_norm.bias", f"{_QKV}.layer_norm_bias", when=_gpt),
    Line("layers.{}.attention.query_key_value.weight", f"{_QKV}.weight"),
    Line("layers.{}.attention.query_key_value.bias", f"{_QKV}.bias", when=with_attention_bias),
    Line(
        "layers.{}.attention.query_norm.weight", "decoder.layers.{}.self_attention.q_layernorm.weight", when=_head_norms
    ),
    Line(
        "layers.{}.attention.key_norm.weight", "decoder.layers.{}.self_attention.k_layernorm.weight", when=_head_norms
    ),
    Line("layers.{}.attention.output.weight", "decoder.layers.{}.self_attention.linear_proj.weight"),
    Line(
        "layers.{}.attention.output.bias", "decoder.layers.{}.self_attention.linear_proj.bias", when=with_attention_bias
    ),
    Line("layers.{}.feed_forward_norm.weight", f"{_FC1}.layer_norm_weight"),
    Line("layers.{}.feed_forward_norm.bias", f"{_FC1}.layer_norm_bias", when=_gpt),
    Line(
        ("layers.{}.feed_forward.gate.weight", "layers.{}.feed_forward.up.weight"),
        f"{_FC1}.weight",
        GATE_UP,
        _not_gpt,
    ),
    Line("layers.{}.feed_forward.up.weight", f"{_FC1}.weight", when=_gpt),
    Line("layers.{}.feed_forward.up.bias", f"{_FC1}.bias", when=_gpt),
    Line("layers.{}.feed_forward.down.weight", "decoder.layers.{}.mlp.linear_fc2.weight"),
    Line("layers.{}.feed_forward.down.bias", "decoder.layers.{}.mlp.linear_fc2.bias", when=_gpt),
    Line("final_norm.weight", "decoder.final_layernorm.weight"),
    Line("final_norm.bias", "decoder.final_layernorm.bias", when=_gpt),
    Line("head.weight", "output_layer.weight", when=untied),
)
EXTRA_STATES = (
    "decoder.layers.self_attention.core_attention._extra_state",
    "decoder.layers.self_attention.linear_proj._extra_state",
    "decoder.layers.self_attention.linear_qkv._extra_state",
    "decoder.layers.mlp.linear_fc1._extra_state",
    "decoder.layers.mlp.linear_fc2._extra_state",
)
"""Where Transformer Engine keeps its FP8 scales; a model in another precision has none, and still asks for them."""
