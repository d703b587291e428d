"""Qwen 3's mixtures of experts (Yang et al. 2025)."""

from megatrain.checkpoint.convert.families.family import Family
from megatrain.checkpoint.convert.families.llama import LLAMA_ATTENTION, LLAMA_OUTSIDE_BLOCKS
from megatrain.checkpoint.convert.families.qwen3 import QWEN3, QWEN3_HEAD_NORMS
from megatrain.checkpoint.convert.forms import EXPERTS
from megatrain.checkpoint.convert.table import Line

_MIXTURE = "model.layers.{}.mlp"
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    ours="qwen3",
    experts=True,
    prefix="model.",
    blocks="model.layers",
    lines=(
        *LLAMA_OUTSIDE_BLOCKS,
        *LLAMA_ATTENTION,
        *QWEN3_HEAD_NORMS,
        Line("layers.{}.feed_forward.router.weight", f"{_MIXTURE}.gate.weight"),
        Line("layers.{}.feed_forward.experts.gate", f"{_MIXTURE}.experts.{{expert}}.gate_proj.weight", EXPERTS),
        Line("layers.{}.feed_forward.experts.up", f"{_MIXTURE}.experts.{{expert}}.up_proj.weight", EXPERTS),
        Line("layers.{}.feed_forward.experts.down", f"{_MIXTURE}.experts.{{expert}}.down_proj.weight", EXPERTS),
    ),
    fields={name: value for name, value in QWEN3.fields.items() if name != "intermediate_size"}
    | {
        "num_hidden_layers": ("num_layers", 24),
        "hidden_size": ("hidden_size", 2048),
        "num_key_value_heads": ("num_kv_heads", 4),
        "head_dim": ("head_width", None),
        "moe_intermediate_size": ("expert_hidden_size", 768),
        "num_experts": ("num_experts", 128),
        "num_experts_per_tok": ("experts_per_token", 8),
        "norm_topk_prob": ("router_normalize", False),
    },
    fixed={
        "hidden_act": ("silu",),
        "use_sliding_window": (False,),
        "decoder_sparse_step": (1,),
        "mlp_only_layers": ([], None),
    },
    aliases={"num_experts": "num_local_experts"},
)
