"""What others train of the same shape: each built by name, as a step that takes this rank's batch and returns a loss.

All update with torch's fused AdamW and clip by torch's norm; several micro-batches are summed as a person would.
Shapes: S sequence, B micro-batch, H heads, K head width, D width.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatrain.config.schema import ResolvedRun
from megatrain.data.feed.rows import Batch
from megatrain.models.build import build_model

Step = Callable[[Batch], Tensor]
Losses = Callable[[Tensor, Tensor], Tensor]
"""(tokens [B, S], labels [B, S]) -> mean loss."""


def engine(config: ResolvedRun) -> Step:
    """megatrain's own."""
    from megatrain.engine.start import start_distributed
    from megatrain.train.build import build_engine

    built, steps = build_engine(config, start_distributed()), iter(range(1, 10**9))
    return lambda batch: built.train_step(batch, next(steps)).loss


def bare_loop(config: ResolvedRun) -> Step:
    """What a person would write for one process, around the same model."""
    model = build_model(config.model, config.train.seed)
    return _loop(config, model, _mean_loss(lambda tokens: model(tokens).transpose(0, 1)))


def torch_ddp(config: ResolvedRun) -> Step:
    """The same over several ranks with ``DistributedDataParallel``."""
    dist.init_process_group("gloo")
    model = nn.parallel.DistributedDataParallel(build_model(config.model, config.train.seed))
    return _loop(config, model, _mean_loss(lambda tokens: model(tokens).transpose(0, 1)), model.no_sync)


def transformers(config: ResolvedRun) -> Step:
    """transformers' Llama with torch's fused attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = config.model
    options: Any = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.feed_forward.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.attention.num_heads,
        num_key_value_heads=shape.attention.num_kv_heads,
        max_position_embeddings=config.data.seq_len,
        tie_word_embeddings=shape.tie_embeddings,
        use_cache=False,
    )
    options._attn_implementation = "sdpa"
    model: Any = LlamaForCausalLM(options)
    return _loop(config, model, _mean_loss(lambda tokens: model(tokens).logits))


def torchtitan(config: ResolvedRun) -> Step:
    """torchtitan's Llama 3 (0.2) with torch's fused attention; without its experts, which ask for Triton, and texts."""
    rest = ("torchtitan.models.moe.kernels", "torchtitan.hf_datasets.text_datasets")
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in rest}):
        from torchtitan.models.llama3.model.args import TransformerModelArgs
        from torchtitan.models.llama3.model.model import Transformer

    shape = config.model
    options = TransformerModelArgs(
        dim=shape.hidden_size,
        n_layers=shape.num_layers,
        n_heads=shape.attention.num_heads,
        n_kv_heads=shape.attention.num_kv_heads,
        vocab_size=shape.vocab_size,
        multiple_of=shape.feed_forward.hidden_size,
        max_seq_len=config.data.seq_len,
    )
    model: Any = Transformer(options)
    with torch.no_grad():
        model.init_weights()
    return _loop(config, model, _mean_loss(model))


def megatron(fused: bool) -> Callable[[ResolvedRun], Step]:
    """megatron-core's CPU spec, as it ships or with torch's fused attention put in; over all ranks of the world."""

    def build(config: ResolvedRun) -> Step:
        dist.init_process_group("gloo")
        stack = contextlib.ExitStack()  # as long as the process
        stack.enter_context(megatron_on_cpu())
        positions = config.data.seq_len
        model = megatron_model(config, dist.get_world_size(), False, positions, fused)
        hidden = torch.ones(1, 1, positions, positions, dtype=torch.bool).triu(1)

        def losses(tokens: Tensor, labels: Tensor) -> Tensor:
            places = torch.arange(positions).expand(len(tokens), -1)
            return model(tokens, places, hidden, labels=labels.contiguous()).mean()

        step = _loop(config, model, losses)
        step.keeps = stack  # type: ignore[attr-defined]
        return step

    return build


PEERS: dict[str, Callable[[ResolvedRun], Step]] = {
    "engine": engine,
    "bare loop": bare_loop,
    "torch DDP": torch_ddp,
    "transformers": transformers,
    "torchtitan": torchtitan,
    "megatron-core": megatron(fused=False),
    "megatron-core, fused attention": megatron(fused=True),
}


def _mean_loss(logits_of: Callable[[Tensor], Tensor]) -> Losses:
    return lambda tokens, labels: F.cross_entropy(logits_of(tokens).flatten(0, 1), labels.flatten())


def _loop(
    config: ResolvedRun,
    model: nn.Module,
    loss_of: Losses,
    no_sync: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> Step:
    """``no_sync``: what keeps gradients on their rank until the last micro-batch."""
    optimizer = _adamw(model, config)

    def step(batch: Batch) -> Tensor:
        total: Any = 0.0
        size = config.train.micro_batch_size
        parts = list(zip(batch.tokens.split(size), batch.labels.split(size), strict=True))
        for number, (tokens, labels) in enumerate(parts):
            with contextlib.nullcontext() if number == len(parts) - 1 else no_sync():
                loss = loss_of(tokens, labels) / len(parts)
                loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def _adamw(model: nn.Module, config: ResolvedRun) -> torch.optim.Optimizer:
    optimizer = config.optimizer
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    return torch.optim.AdamW(
        [{"params": decay, "weight_decay": optimizer.weight_decay}, {"params": rest, "weight_decay": 0.0}],
        lr=optimizer.lr,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
        fused=True,
    )


class _FusedAttention(nn.Module):
    """torch's attention in the place of megatron-core's, which multiplies scores by themselves."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, query_SBHK: Tensor, key_SBGK: Tensor, value_SBGK: Tensor, *_: Any, **__: Any) -> Tensor:
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBHK, key_SBGK, value_SBGK))
        grouped = query.shape[1] != key.shape[1]
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        return mixed.permute(2, 0, 1, 3).flatten(2)


def megatron_model(
    config: ResolvedRun, size: int, sequence_parallel: bool, positions: int, fused: bool = False
) -> nn.Module:
    """megatron-core's GPTModel of a Llama's shape, tensor parallel over ``size`` ranks; within ``megatron_on_cpu``."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    shape = config.model
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size, create_gloo_process_groups=False)
    options = TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.attention.num_heads,
        num_query_groups=shape.attention.num_kv_heads,
        ffn_hidden_size=shape.feed_forward.hidden_size,
        tensor_model_parallel_size=size,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
    )
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    if fused:
        spec.submodules.self_attention.submodules.core_attention = _FusedAttention
    return GPTModel(
        options,
        spec,
        vocab_size=shape.vocab_size,
        max_sequence_length=positions,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=shape.tie_embeddings,
    )


@contextlib.contextmanager
def megatron_on_cpu() -> Iterator[None]:
    """Its random states and, under sequence parallelism, its norm want CUDA; neither sends anything."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    def norm(_: type, config: object, hidden_size: int, eps: float = 1e-5, **__: object) -> nn.Module:
        return nn.RMSNorm(hidden_size, eps)

    with (
        mock.patch.object(torch.cuda, "current_device", lambda: torch.device("cpu")),
        mock.patch.object(CudaRNGStatesTracker, "fork", lambda *_, **__: contextlib.nullcontext()),
        mock.patch.object(WrappedTorchNorm, "__new__", norm),
    ):
        yield
