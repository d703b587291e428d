"""GPT-2, Radford et al. 2019. Its matrices stand transposed (inputs x outputs)."""

from megatrain.convert.families.family import Family
from megatrain.convert.forms import GPT2_THIRDS, TRANSPOSED, VOCABULARY
from megatrain.convert.table import Line, untied

GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    ours="gpt",
    prefix="transformer.",
    blocks="transformer.h",
    lines=(
        Line("embedding.word.weight", "transformer.wte.weight", VOCABULARY),
        Line("embedding.position.weight", "transformer.wpe.weight"),
        Line("layers.{}.attention_norm.weight", "transformer.h.{}.ln_1.weight"),
        Line("layers.{}.attention_norm.bias", "transformer.h.{}.ln_1.bias"),
        Line("layers.{}.attention.query_key_value.weight", "transformer.h.{}.attn.c_attn.weight", GPT2_THIRDS),
        Line("layers.{}.attention.query_key_value.bias", "transformer.h.{}.attn.c_attn.bias", GPT2_THIRDS),
        Line("layers.{}.attention.output.weight", "transformer.h.{}.attn.c_proj.weight", TRANSPOSED),
        Line("layers.{}.attention.output.bias", "transformer.h.{}.attn.c_proj.bias"),
        Line("layers.{}.feed_forward_norm.weight", "transformer.h.{}.ln_2.weight"),
        Line("layers.{}.feed_forward_norm.bias", "transformer.h.{}.ln_2.bias"),
        Line("layers.{}.feed_forward.up.weight", "transformer.h.{}.mlp.c_fc.weight", TRANSPOSED),
        Line("layers.{}.feed_forward.up.bias", "transformer.h.{}.mlp.c_fc.bias"),
        Line("layers.{}.feed_forward.down.weight", "transformer.h.{}.mlp.c_proj.weight", TRANSPOSED),
        Line("layers.{}.feed_forward.down.bias", "transformer.h.{}.mlp.c_proj.bias"),
        Line("final_norm.weight", "transformer.ln_f.weight"),
        Line("final_norm.bias", "transformer.ln_f.bias"),
        Line("head.weight", "lm_head.weight", VOCABULARY, untied),
    ),
    fields={
        "n_layer": ("num_layers", 12),
        "n_embd": ("hidden_size", 768),
        "n_head": ("attention.num_heads", 12),
        "n_inner": ("feed_forward.hidden_size", None),
        "vocab_size": ("vocab_size", 50257),
        "n_positions": ("max_seq_len", 1024),
        "layer_norm_epsilon": ("norm.eps", 1e-5),
        "initializer_range": ("init_std", 0.02),
        "tie_word_embeddings": ("tie_embeddings", True),
        "resid_pdrop": ("dropout", 0.1),
        "embd_pdrop": ("dropout", 0.1),
        "attn_pdrop": ("attention.dropout", 0.1),
    },
    fixed={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
)
