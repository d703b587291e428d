"""Megatron-core's own GPT model on one CPU process: it loads and saves the checkpoints and runs them."""

import contextlib
import multiprocessing
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatrain.config.derive import mixture_layers
from megatrain.config.schema import ModelConfig

States = dict[tuple[str, str], torch.Tensor]


def gpt_model(model: ModelConfig, transformer_engine_names: bool = True) -> Any:
    """The model in Megatron-core; the process must be in a world of one rank.

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
    parallel_state.initialize_model_parallel()
    gpt, mixture = model.family == "gpt", mixture_layers(model)
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
        **(_expert_settings(model) if model.num_experts else {}),
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
        rotary_base=int(model.rope_theta),
        share_embeddings_and_output_weights=bool(model.tie_embeddings),
        parallel_output=False,
    ).eval()


def _expert_settings(model: ModelConfig) -> dict[str, Any]:
    shared = model.num_shared_experts * (model.expert_hidden_size or 0)
    return {
        "num_moe_experts": model.num_experts,
        "moe_ffn_hidden_size": model.expert_hidden_size,
        "moe_router_topk": model.experts_per_token,
        "moe_layer_freq": [int(layer in mixture_layers(model)) for layer in range(model.num_layers)]
        if len(mixture_layers(model)) < model.num_layers
        else 1,
        "moe_shared_expert_intermediate_size": shared or None,
        "moe_router_score_function": model.router_score,
        "moe_router_pre_softmax": not model.router_normalize,
        "moe_router_enable_expert_bias": bool(model.router_balance_rate),
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
    }


@torch.no_grad()
def load_and_run(folder: str, model: ModelConfig, tokens: torch.Tensor) -> torch.Tensor:
    """Loads a checkpoint by dist_checkpointing and returns the logits of its tokens."""
    from megatron.core import dist_checkpointing

    gpt = gpt_model(model)
    loaded = dist_checkpointing.load({"model": gpt.sharded_state_dict()}, folder)
    assert loaded["iteration"] == int(Path(folder).name.removeprefix("iter_"))
    gpt.load_state_dict(loaded["model"])
    return _run(gpt, tokens)


def random_model(model: ModelConfig, **options: Any) -> Any:
    """A model whose norms and balance biases are random too."""
    torch.manual_seed(3)
    gpt = gpt_model(model, **options)
    with torch.no_grad():
        biases = [buffer for name, buffer in gpt.named_buffers() if name.endswith("expert_bias")]
        for tensor in (*gpt.parameters(), *biases):
            tensor.add_(0.1 * torch.randn_like(tensor))
    return gpt


@torch.no_grad()
def save_and_run(
    folder: str, model: ModelConfig, tokens: torch.Tensor, names: bool = True, singly: bool = False
) -> torch.Tensor:
    """Saves a random model by dist_checkpointing and returns the logits of its tokens.

    ``names``: see gpt_model; ``singly``: each layer, expert and half of a gated matrix under its own key.
    """
    gpt = random_model(model, transformer_engine_names=names)
    _save(folder, {"iteration": 7, "model": gpt.sharded_state_dict(metadata={"singleton_local_shards": singly})})
    return _run(gpt, tokens)


def train_and_save(folder: str, model: ModelConfig, tokens: torch.Tensor) -> States:
    """Two steps of Megatron-core's FP32 optimizer around AdamW, saved with its states, which are returned."""
    gpt = random_model(model)
    optimizer = _optimizer(list(gpt.parameters()))
    for _ in range(2):
        _run(gpt, tokens).logsumexp(-1).mean().backward()
        optimizer.optimizer.step()
    sharded = gpt.sharded_state_dict()
    _save(folder, {"iteration": 2, "model": sharded, "optimizer": optimizer.sharded_state_dict(sharded)})
    return _states(gpt, optimizer)


def save_chained_states(folder: str, model: ModelConfig) -> None:
    """A mixture with Megatron-core's two optimizers, for experts and for the rest; moments are 2 w and w squared."""
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    gpt = random_model(model)
    named = dict(gpt.named_parameters())
    chosen = [[tensor for name, tensor in named.items() if (".experts." in name) == experts] for experts in (0, 1)]
    optimizers = [_optimizer(parameters) for parameters in chosen]
    for optimizer, parameters in zip(optimizers, chosen, strict=True):
        for tensor in parameters:
            weight = tensor.detach().clone()
            optimizer.optimizer.state[tensor] = {
                "step": torch.tensor(2.0),
                "exp_avg": 2 * weight,
                "exp_avg_sq": weight**2,
            }
    sharded = gpt.sharded_state_dict()
    _save(folder, {"model": sharded, "optimizer": ChainedOptimizer(optimizers).sharded_state_dict(sharded)})


def load_states(folder: str, model: ModelConfig) -> tuple[States, float]:
    """What the model and its optimizer hold after dist_checkpointing loaded them, and the step."""
    from megatron.core import dist_checkpointing

    gpt = gpt_model(model)
    optimizer = _optimizer(list(gpt.parameters()))
    sharded = gpt.sharded_state_dict()
    wanted = {"model": sharded, "optimizer": optimizer.sharded_state_dict(sharded, is_loading=True)}
    loaded = dist_checkpointing.load(wanted, folder)
    gpt.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    steps = {float(state["step"]) for state in optimizer.optimizer.state.values()}
    assert len(steps) == 1
    return _states(gpt, optimizer), steps.pop()


def _optimizer(parameters: list[torch.nn.Parameter]) -> Any:
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.optimizer.optimizer import FP32Optimizer

    shared = {"lr_mult": 1.0, "is_expert_parallel": False, "is_decoupled_lr": False}
    decayed = [parameter for parameter in parameters if parameter.dim() > 1]
    others = [parameter for parameter in parameters if parameter.dim() == 1]
    groups = [{"params": decayed, "wd_mult": 1.0, **shared}, {"params": others, "wd_mult": 0.0, **shared}]

    def make_states(optimizer: torch.optim.Optimizer, config: Any = None) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                zeros = {kind: torch.zeros_like(parameter) for kind in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": torch.tensor(0.0), **zeros}

    tensor = torch.tensor  # it asks for a GPU to put a 1 on
    with mock.patch.object(torch, "tensor", lambda *values, device, **options: tensor(*values, **options)):
        return FP32Optimizer(torch.optim.AdamW(groups, lr=1e-2), OptimizerConfig(), make_states)


def _states(gpt: Any, optimizer: Any) -> States:
    found = {}
    for name, parameter in gpt.named_parameters():
        found["weight", name] = parameter.detach().clone()
        for kind in ("exp_avg", "exp_avg_sq"):
            found[kind, name] = optimizer.optimizer.state[parameter][kind].clone()
    return found


def _save(folder: str, state: dict[str, Any]) -> None:
    from megatron.core import dist_checkpointing

    Path(folder).mkdir(parents=True)
    # it writes in processes of its own, which the pool's daemons may not have
    with mock.patch.dict(multiprocessing.current_process()._config, daemon=False):  # type: ignore[attr-defined]
        dist_checkpointing.save(state, folder)


def _run(gpt: Any, tokens: torch.Tensor) -> torch.Tensor:
    length = tokens.shape[1]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    return gpt(tokens, torch.arange(length)[None].expand_as(tokens), future)
