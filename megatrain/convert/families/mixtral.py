"""Mixtral (Jiang et al. 2024): Llama's architecture with a mixture of experts in every block."""

from megatrain.convert.families.family import Family
from megatrain.convert.families.llama import LLAMA_ATTENTION, LLAMA_FIELDS, LLAMA_OUTSIDE_BLOCKS
from megatrain.convert.forms import EXPERTS, STACKED_EXPERTS, STACKED_GATE_UP
from megatrain.convert.table import Line
from megatrain.spec.derive import mixture_layers

# the experts as transformers 5 holds them in its modules, whatever the family
STACKED_MIXTURE = (
    Line("layers.{}.feed_forward.router.weight", "model.layers.{}.mlp.gate.weight", blocks=mixture_layers),
    Line(
        ("layers.{}.feed_forward.experts.gate", "layers.{}.feed_forward.experts.up"),
        "model.layers.{}.mlp.experts.gate_up_proj",
        STACKED_GATE_UP,
        blocks=mixture_layers,
    ),
    Line(
        "layers.{}.feed_forward.experts.down",
        "model.layers.{}.mlp.experts.down_proj",
        STACKED_EXPERTS,
        blocks=mixture_layers,
    ),
)
_MIXTURE = "model.layers.{}.block_sparse_moe"
MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    ours="llama",
    experts=True,
    prefix="model.",
    blocks="model.layers",
    lines=(
        *LLAMA_OUTSIDE_BLOCKS,
        *LLAMA_ATTENTION,
        Line("layers.{}.feed_forward.router.weight", f"{_MIXTURE}.gate.weight"),
        Line("layers.{}.feed_forward.experts.gate", f"{_MIXTURE}.experts.{{expert}}.w1.weight", EXPERTS),
        Line("layers.{}.feed_forward.experts.up", f"{_MIXTURE}.experts.{{expert}}.w3.weight", EXPERTS),
        Line("layers.{}.feed_forward.experts.down", f"{_MIXTURE}.experts.{{expert}}.w2.weight", EXPERTS),
    ),
    modules=(*LLAMA_OUTSIDE_BLOCKS, *LLAMA_ATTENTION, *STACKED_MIXTURE),
    fields={name: value for name, value in LLAMA_FIELDS.items() if name != "attention_bias"}
    | {
        "num_key_value_heads": ("attention.num_kv_heads", 8),
        "intermediate_size": ("experts.hidden_size", 14336),
        "max_position_embeddings": ("max_seq_len", 131072),
        "rms_norm_eps": ("norm.eps", 1e-5),
        "num_local_experts": ("experts.num_experts", 8),
        "num_experts_per_tok": ("experts.per_token", 2),
    },
    fixed={"hidden_act": ("silu",), "sliding_window": (None,)},
    rope_theta=1e6,
)
