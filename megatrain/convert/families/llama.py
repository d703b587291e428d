"""Llama 2 and 3 (Touvron et al. 2023, Grattafiori et al. 2024), and models of the same architecture."""

from megatrain.convert.families.family import Family
from megatrain.convert.forms import QUERY_KEY_VALUE, VOCABULARY
from megatrain.convert.table import Line, dense_blocks, untied, with_attention_bias

LLAMA_OUTSIDE_BLOCKS = (
    Line("embedding.word.weight", "model.embed_tokens.weight", VOCABULARY),
    Line("final_norm.weight", "model.norm.weight"),
    Line("head.weight", "lm_head.weight", VOCABULARY, untied),
)
LLAMA_ATTENTION = (
    Line("layers.{}.attention_norm.weight", "model.layers.{}.input_layernorm.weight"),
    Line(
        "layers.{}.attention.query_key_value.weight",
        (
            "model.layers.{}.self_attn.q_proj.weight",
            "model.layers.{}.self_attn.k_proj.weight",
            "model.layers.{}.self_attn.v_proj.weight",
        ),
        QUERY_KEY_VALUE,
    ),
    Line(
        "layers.{}.attention.query_key_value.bias",
        (
            "model.layers.{}.self_attn.q_proj.bias",
            "model.layers.{}.self_attn.k_proj.bias",
            "model.layers.{}.self_attn.v_proj.bias",
        ),
        QUERY_KEY_VALUE,
        with_attention_bias,
    ),
    Line("layers.{}.attention.output.weight", "model.layers.{}.self_attn.o_proj.weight"),
    Line("layers.{}.attention.output.bias", "model.layers.{}.self_attn.o_proj.bias", when=with_attention_bias),
    Line("layers.{}.feed_forward_norm.weight", "model.layers.{}.post_attention_layernorm.weight"),
)
LLAMA_FEED_FORWARD = (
    Line("layers.{}.feed_forward.gate.weight", "model.layers.{}.mlp.gate_proj.weight", blocks=dense_blocks),
    Line("layers.{}.feed_forward.up.weight", "model.layers.{}.mlp.up_proj.weight", blocks=dense_blocks),
    Line("layers.{}.feed_forward.down.weight", "model.layers.{}.mlp.down_proj.weight", blocks=dense_blocks),
)
LLAMA_FIELDS = {
    "num_hidden_layers": ("num_layers", 32),
    "hidden_size": ("hidden_size", 4096),
    "num_attention_heads": ("attention.num_heads", 32),
    "num_key_value_heads": ("attention.num_kv_heads", None),
    "head_dim": ("attention.head_width", None),
    "intermediate_size": ("feed_forward.hidden_size", 11008),
    "vocab_size": ("vocab_size", 32000),
    "max_position_embeddings": ("max_seq_len", 2048),
    "tie_word_embeddings": ("tie_embeddings", False),
    "attention_bias": ("attention.bias", False),
    "rms_norm_eps": ("norm.eps", 1e-6),
    "initializer_range": ("init_std", 0.02),
    "attention_dropout": ("attention.dropout", 0.0),
}

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    ours="llama",
    prefix="model.",
    blocks="model.layers",
    lines=(*LLAMA_OUTSIDE_BLOCKS, *LLAMA_ATTENTION, *LLAMA_FEED_FORWARD),
    fields=LLAMA_FIELDS,
    fixed={"hidden_act": ("silu",), "mlp_bias": (False,)},
)
