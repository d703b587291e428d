"""Qwen 3 (Yang et al. 2025): Llama's architecture with norms of queries and keys."""

from megatrain.convert.families.family import Family
from megatrain.convert.families.llama import (
    LLAMA_ATTENTION,
    LLAMA_FEED_FORWARD,
    LLAMA_FIELDS,
    LLAMA_OUTSIDE_BLOCKS,
)
from megatrain.convert.table import Line

QWEN3_HEAD_NORMS = (
    Line("layers.{}.attention.query_norm.weight", "model.layers.{}.self_attn.q_norm.weight"),
    Line("layers.{}.attention.key_norm.weight", "model.layers.{}.self_attn.k_norm.weight"),
)

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    ours="qwen3",
    prefix="model.",
    blocks="model.layers",
    lines=(*LLAMA_OUTSIDE_BLOCKS, *LLAMA_ATTENTION, *QWEN3_HEAD_NORMS, *LLAMA_FEED_FORWARD),
    fields=LLAMA_FIELDS
    | {
        "num_key_value_heads": ("attention.num_kv_heads", 32),
        "head_dim": ("attention.head_width", 128),
        "intermediate_size": ("feed_forward.hidden_size", 22016),
        "vocab_size": ("vocab_size", 151936),
        "max_position_embeddings": ("max_seq_len", 32768),
    },
    fixed={"hidden_act": ("silu",), "use_sliding_window": (False,)},
)
