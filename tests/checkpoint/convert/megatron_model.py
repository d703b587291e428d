"""Megatron-core's own GPT model on one CPU process: it loads and saves the checkpoints and runs them."""

import contextlib
import multiprocessing
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatrain.config.schema import ModelConfig


def gpt_model(model: ModelConfig) -> Any:
    """The model in Megatron-core; the process must be in a world of one rank."""
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    tensor_parallel.get_cuda_rng_tracker = lambda: type("Tracker", (), {"fork": staticmethod(contextlib.nullcontext)})
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel()
    gpt = model.family == "gpt"
    norm, head_norms = ("LayerNorm" if gpt else "RMSNorm"), model.family == "qwen3"
    config = TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        num_query_groups=model.num_kv_heads,
        kv_channels=model.head_width,
        ffn_hidden_size=model.ffn_hidden_size,
        layernorm_epsilon=model.norm_eps,
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
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization=norm, qk_layernorm=head_norms),
        vocab_size=model.vocab_size,
        max_sequence_length=model.max_seq_len,
        position_embedding_type="learned_absolute" if gpt else "rope",
        rotary_base=int(model.rope_theta),
        share_embeddings_and_output_weights=bool(model.tie_embeddings),
        parallel_output=False,
    ).eval()


@torch.no_grad()
def load_and_run(folder: str, model: ModelConfig, tokens: torch.Tensor) -> torch.Tensor:
    """Loads a checkpoint by dist_checkpointing and returns the logits of its tokens."""
    from megatron.core import dist_checkpointing

    gpt = gpt_model(model)
    loaded = dist_checkpointing.load({"model": gpt.sharded_state_dict()}, folder)
    assert loaded["iteration"] == int(Path(folder).name.removeprefix("iter_"))
    gpt.load_state_dict(loaded["model"])
    return _run(gpt, tokens)


@torch.no_grad()
def save_and_run(folder: str, model: ModelConfig, tokens: torch.Tensor) -> torch.Tensor:
    """Saves a random model by dist_checkpointing and returns the logits of its tokens."""
    from megatron.core import dist_checkpointing

    torch.manual_seed(3)
    gpt = gpt_model(model)
    for parameter in gpt.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    Path(folder).mkdir(parents=True)
    # it writes in processes of its own, which the pool's daemons may not have
    with mock.patch.dict(multiprocessing.current_process()._config, daemon=False):  # type: ignore[attr-defined]
        dist_checkpointing.save({"iteration": 7, "model": gpt.sharded_state_dict()}, folder)
    return _run(gpt, tokens)


def _run(gpt: Any, tokens: torch.Tensor) -> torch.Tensor:
    length = tokens.shape[1]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    return gpt(tokens, torch.arange(length)[None].expand_as(tokens), future)
