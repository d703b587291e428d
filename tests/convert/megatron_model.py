"""Megatron-core's own GPT model on one CPU process: it loads and saves the checkpoints and runs them."""

import contextlib
import multiprocessing
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatrain.spec.derive import mixture_layers
from megatrain.spec.schema import ModelSpec

States = dict[tuple[str, str], torch.Tensor]


def gpt_model(model: ModelSpec, transformer_engine_names: bool = True, expert_ranks: int = 1) -> Any:
    """The model in Megatron-core on the ranks of the process's world.

    ``transformer_engine_names``: call the norm before experts as layers of Transformer Engine, which GPUs have, do.
    """
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe import moe_utils

    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    tensor_parallel.get_cuda_rng_tracker = lambda: type("Tracker", (), {"fork": staticmethod(contextlib.nullcontext)})
    moe_utils.te_general_gemm = None  # left undefined without Transformer Engine, and asked for
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=expert_ranks)
    gpt, mixture = model.family == "gpt", mixture_layers(model)
    norm, head_norms = ("LayerNorm" if gpt else "RMSNorm"), model.family == "qwen3"
    config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.attention.num_heads,
        num_query_groups=model.attention.num_kv_heads,
        kv_channels=model.attention.head_width,
        ffn_hidden_size=model.feed_forward.hidden_size,
        layernorm_epsilon=model.norm.eps,
        normalization=norm,
        qk_layernorm=head_norms,
        gated_linear_unit=not gpt,
        activation_func=(lambda x: torch.nn.functional.gelu(x, approximate="tanh"))
        if gpt
        else torch.nn.functional.silu,
        add_bias_linear=gpt,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        **(_expert_settings(model) | {"expert_model_parallel_size": expert_ranks} if model.experts.num_experts else {}),
    )
    if mixture:
        spec: Any = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=norm)
        for layer in mixture if transformer_engine_names else ():
            layer_map = spec.layer_specs[layer].submodules.sharded_state_dict_keys_map
            spec.layer_specs[layer].submodules.sharded_state_dict_keys_map = {
                ours: theirs for ours, theirs in layer_map.items() if ours != "pre_mlp_layernorm."
            }
    else:
        spec = get_gpt_layer_local_spec(normalization=norm, qk_layernorm=head_norms)
    return GPTModel(
        config,
        spec,
        vocab_size=model.vocab_size,
        max_sequence_length=model.max_seq_len,
        position_embedding_type="learned_absolute" if gpt else "rope",
        rotary_base=int(model.rope.theta),
        share_embeddings_and_output_weights=bool(model.tie_embeddings),
        parallel_output=False,
    ).eval()


def _expert_settings(model: ModelSpec) -> dict[str, Any]:
    shared = model.experts.num_shared * (model.experts.hidden_size or 0)
    return {
        "num_moe_experts": model.experts.num_experts,
        "moe_ffn_hidden_size": model.experts.hidden_size,
        "moe_router_topk": model.experts.per_token,
        "moe_layer_freq": [int(layer in mixture_layers(model)) for layer in range(model.num_layers)]
        if len(mixture_layers(model)) < model.num_layers
        else 1,
        "moe_shared_expert_intermediate_size": shared or None,
        "moe_router_score_function": model.router.score,
        "moe_router_pre_softmax": not model.router.normalize,
        "moe_router_enable_expert_bias": bool(model.router.balance_rate),
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
    }


@torch.no_grad()
def load_and_run(folder: str, model: ModelSpec, tokens: torch.Tensor) -> torch.Tensor:
    """Loads a checkpoint by dist_checkpointing and returns the logits of its tokens."""
    from megatron.core import dist_checkpointing

    gpt = gpt_model(model)
    loaded = dist_checkpointing.load({"model": gpt.sharded_state_dict()}, folder)
    assert loaded["iteration"] == int(Path(folder).name.removeprefix("iter_"))
    gpt.load_state_dict(loaded["model"])
    return run(gpt, tokens)


def random_model(model: ModelSpec, seed: int = 3, **options: Any) -> Any:
    """A model whose norms and balance biases are random too."""
    torch.manual_seed(seed)
    gpt = gpt_model(model, **options)
    with torch.no_grad():
        biases = [buffer for name, buffer in gpt.named_buffers() if name.endswith("expert_bias")]
        for tensor in (*gpt.parameters(), *biases):
            tensor.add_(0.1 * torch.randn_like(tensor))
    return gpt


@torch.no_grad()
def save_and_run(
    folder: str, model: ModelSpec, tokens: torch.Tensor, names: bool = True, singly: bool = False
) -> torch.Tensor:
    """Saves a random model by dist_checkpointing and returns the logits of its tokens.

    ``names``: see gpt_model; ``singly``: each layer, expert and half of a gated matrix under its own key.
    """
    gpt = random_model(model, transformer_engine_names=names)
    save(folder, {"iteration": 7, "model": gpt.sharded_state_dict(metadata={"singleton_local_shards": singly})})
    return run(gpt, tokens)


def save(folder: str, state: dict[str, Any], **options: Any) -> None:
    from megatron.core import dist_checkpointing

    Path(folder).mkdir(parents=True, exist_ok=True)
    # it writes in processes of its own, which the pool's daemons may not have
    with mock.patch.dict(multiprocessing.current_process()._config, daemon=False):  # type: ignore[attr-defined]
        dist_checkpointing.save(state, folder, **options)


def run(gpt: Any, tokens: torch.Tensor) -> torch.Tensor:
    length = tokens.shape[1]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    return gpt(tokens, torch.arange(length)[None].expand_as(tokens), future)
