"""Megatron-core's GPT model: one table for every family, in the names of its layer specs with Transformer Engine.

Its rows of queries, keys and values stand group by group as here, and its vocabulary keeps the padding.
"""

from megatrain.convert.forms import GATE_UP, STACKED_EXPERTS, STACKED_GATE_UP
from megatrain.convert.table import Line, balanced, dense_blocks, untied, with_attention_bias
from megatrain.spec.derive import mixture_layers
from megatrain.spec.schema import ModelSpec


def _learned_positions(model: ModelSpec) -> bool:
    return model.positions.kind == "learned"


def _norm_biases(model: ModelSpec) -> bool:
    return model.norm.kind == "layer_norm"


def _one_input(model: ModelSpec) -> bool:
    return model.feed_forward.activation == "gelu"


def _gated(model: ModelSpec) -> bool:
    return model.feed_forward.activation == "swiglu"


def _biases(model: ModelSpec) -> bool:
    return model.feed_forward.bias


def _shared_experts(model: ModelSpec) -> bool:
    return model.experts.num_shared > 0


def _head_norms(model: ModelSpec) -> bool:
    return model.attention.head_norms


_QKV, _MLP = "decoder.layers.{}.self_attention.linear_qkv", "decoder.layers.{}.mlp"
_FC1 = f"{_MLP}.linear_fc1"
MIXTURE = (
    Line("layers.{}.feed_forward_norm.weight", "decoder.layers.{}.pre_mlp_layernorm.weight", blocks=mixture_layers),
    Line("layers.{}.feed_forward.router.weight", f"{_MLP}.router.weight", when=_gated, blocks=mixture_layers),
    Line(
        "layers.{}.feed_forward.router.balance_bias",
        f"{_MLP}.router.expert_bias",
        when=balanced,
        blocks=mixture_layers,
    ),
    Line(
        ("layers.{}.feed_forward.experts.gate", "layers.{}.feed_forward.experts.up"),
        f"{_MLP}.experts.experts.linear_fc1.weight",
        STACKED_GATE_UP,
        _gated,
        mixture_layers,
    ),
    Line(
        "layers.{}.feed_forward.experts.down",
        f"{_MLP}.experts.experts.linear_fc2.weight",
        STACKED_EXPERTS,
        _gated,
        mixture_layers,
    ),
    Line(
        ("layers.{}.feed_forward.shared.gate.weight", "layers.{}.feed_forward.shared.up.weight"),
        f"{_MLP}.shared_experts.linear_fc1.weight",
        GATE_UP,
        _shared_experts,
        mixture_layers,
    ),
    Line(
        "layers.{}.feed_forward.shared.down.weight",
        f"{_MLP}.shared_experts.linear_fc2.weight",
        when=_shared_experts,
        blocks=mixture_layers,
    ),
)
"""Blocks with experts. Megatron-core's have no biases, so those of the family gpt have no place here."""
MEGATRON_CORE = (
    Line("embedding.word.weight", "embedding.word_embeddings.weight"),
    Line("embedding.position.weight", "embedding.position_embeddings.weight", when=_learned_positions),
    Line("layers.{}.attention_norm.weight", f"{_QKV}.layer_norm_weight"),
    Line("layers.{}.attention_norm.bias", f"{_QKV}.layer_norm_bias", when=_norm_biases),
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
    Line("layers.{}.feed_forward_norm.weight", f"{_FC1}.layer_norm_weight", blocks=dense_blocks),
    Line("layers.{}.feed_forward_norm.bias", f"{_FC1}.layer_norm_bias", when=_norm_biases, blocks=dense_blocks),
    Line(
        ("layers.{}.feed_forward.gate.weight", "layers.{}.feed_forward.up.weight"),
        f"{_FC1}.weight",
        GATE_UP,
        _gated,
        dense_blocks,
    ),
    Line("layers.{}.feed_forward.up.weight", f"{_FC1}.weight", when=_one_input, blocks=dense_blocks),
    Line("layers.{}.feed_forward.up.bias", f"{_FC1}.bias", when=_biases, blocks=dense_blocks),
    Line("layers.{}.feed_forward.down.weight", f"{_MLP}.linear_fc2.weight", blocks=dense_blocks),
    Line("layers.{}.feed_forward.down.bias", f"{_MLP}.linear_fc2.bias", when=_biases, blocks=dense_blocks),
    *MIXTURE,
    Line("final_norm.weight", "decoder.final_layernorm.weight"),
    Line("final_norm.bias", "decoder.final_layernorm.bias", when=_norm_biases),
    Line("head.weight", "output_layer.weight", when=untied),
)
_ATTENTION_STATES = (
    "self_attention.core_attention",
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
)
_DENSE_STATES, _SHARED_STATES = (
    ("mlp.linear_fc1", "mlp.linear_fc2"),
    (
        "mlp.shared_experts.linear_fc1",
        "mlp.shared_experts.linear_fc2",
    ),
)
_EXPERT_STATES = ("mlp.experts.experts.linear_fc1", "mlp.experts.experts.linear_fc2")


def extra_states(model: ModelSpec, layer: int) -> list[tuple[str, int]]:
    """(module, experts that have one each, or 0) where Transformer Engine keeps its FP8 scales in a block; a model in
    another precision has none, and still asks for them."""
    if layer not in mixture_layers(model):
        return [(name, 0) for name in (*_ATTENTION_STATES, *_DENSE_STATES)]
    plain = (*_ATTENTION_STATES, *(_SHARED_STATES if model.experts.num_shared else ()))
    return [*((name, 0) for name in plain), *((name, model.experts.num_experts) for name in _EXPERT_STATES)]
