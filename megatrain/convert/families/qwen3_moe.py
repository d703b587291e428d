"""Qwen 3's mixtures of experts (Yang et al. 2025)."""

from megatrain.convert.families.family import Family
from megatrain.convert.families.llama import LLAMA_ATTENTION, LLAMA_FEED_FORWARD, LLAMA_OUTSIDE_BLOCKS
from megatrain.convert.families.mixtral import STACKED_MIXTURE
from megatrain.convert.families.qwen3 import QWEN3, QWEN3_HEAD_NORMS
from megatrain.convert.forms import EXPERTS
from megatrain.convert.table import Line
from megatrain.spec.derive import mixture_layers

_MIXTURE = "model.layers.{}.mlp"
_REST = (*LLAMA_OUTSIDE_BLOCKS, *LLAMA_ATTENTION, *QWEN3_HEAD_NORMS, *LLAMA_FEED_FORWARD)
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    ours="qwen3",
    experts=True,
    prefix="model.",
    blocks="model.layers",
    lines=(
        *_REST,
        Line("layers.{}.feed_forward.router.weight", f"{_MIXTURE}.gate.weight", blocks=mixture_layers),
        *(
            Line(
                f"layers.{{}}.feed_forward.experts.{part}",
                f"{_MIXTURE}.experts.{{expert}}.{part}_proj.weight",
                EXPERTS,
                blocks=mixture_layers,
            )
            for part in ("gate", "up", "down")
        ),
    ),
    modules=(*_REST, *STACKED_MIXTURE),
    dense_blocks="mlp_only_layers",
    fields=dict(QWEN3.fields)
    | {
        "intermediate_size": ("feed_forward.hidden_size", 6144),
        "num_hidden_layers": ("num_layers", 24),
        "hidden_size": ("hidden_size", 2048),
        "num_key_value_heads": ("attention.num_kv_heads", 4),
        "head_dim": ("attention.head_width", None),
        "moe_intermediate_size": ("experts.hidden_size", 768),
        "num_experts": ("experts.num_experts", 128),
        "num_experts_per_tok": ("experts.per_token", 8),
        "decoder_sparse_step": ("experts.interval", 1),
        "norm_topk_prob": ("router.normalize", False),
    },
    fixed={"hidden_act": ("silu",), "use_sliding_window": (False,)},
    aliases={"num_experts": "num_local_experts"},
)
