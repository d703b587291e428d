"""Mistral (Jiang et al. 2023): Llama's architecture, whose attention reaches back so many positions."""

from dataclasses import replace

from megatrain.convert.families.llama import LLAMA, LLAMA_FIELDS

MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    ours="mistral",
    fields={name: value for name, value in LLAMA_FIELDS.items() if name != "attention_bias"}
    | {
        "num_key_value_heads": ("attention.num_kv_heads", 8),
        "intermediate_size": ("feed_forward.hidden_size", 14336),
        "max_position_embeddings": ("max_seq_len", 131072),
    },
    fixed={"hidden_act": ("silu",)},
    window=("sliding_window", 4096),
)
