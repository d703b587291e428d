"""What torch, DeepSpeed and megatron-core send by themselves: the same model, batch and ranks, their own defaults."""

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.traffic import Traffic
from megatrain.config.schema import ResolvedRun
from megatrain.models.build import build_model

Peer = Callable[[ResolvedRun, Tensor], Traffic]
"""(config of one rank, tokens [m, B, S + 1] of its micro-batches) -> what the second step sends."""


def _twice(step: Callable[[], None]) -> Traffic:
    for _ in range(2):
        with Traffic() as traffic:
            step()
    return traffic


def _all_reduce(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """What DDP does without a hook, from Python, where it is counted."""
    dist.all_reduce(bucket.buffer())
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def torch_ddp(config: ResolvedRun, tokens_mBS: Tensor) -> Traffic:
    """``DistributedDataParallel``, gradients summed once a step."""
    model = nn.parallel.DistributedDataParallel(build_model(config.model, 0))
    model.register_comm_hook(None, _all_reduce)

    def step() -> None:
        for number, tokens in enumerate(tokens_mBS):
            last = number == len(tokens_mBS) - 1
            with contextlib.nullcontext() if last else model.no_sync():
                model(tokens[:, :-1], tokens[:, 1:]).sum().backward()

    return _twice(step)


def deepspeed_zero(stage: int) -> Peer:
    """DeepSpeed's engine with nothing set but what must be."""

    def count(config: ResolvedRun, tokens_mBS: Tensor) -> Traffic:
        import deepspeed

        model = build_model(config.model, 0)
        m, batch_size = tokens_mBS.shape[:2]
        settings = {
            "train_micro_batch_size_per_gpu": batch_size,
            "gradient_accumulation_steps": m,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
        }
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)

        def step() -> None:
            for tokens in tokens_mBS:
                engine.backward(engine(tokens[:, :-1], tokens[:, 1:]).sum() / tokens.numel())
                engine.step()

        traffic = _twice(step)
        engine.destroy()
        return traffic

    return count


def megatron_core(sequence_parallel: bool) -> Peer:
    """megatron-core's GPTModel over all ranks; under sequence parallelism without the sum of its norms' gradients."""

    def count(config: ResolvedRun, tokens_mBS: Tensor) -> Traffic:
        with _megatron_on_cpu():
            from megatron.core import parallel_state
            from megatron.core.models.gpt import GPTModel
            from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
            from megatron.core.transformer import TransformerConfig

            size, shape, positions = dist.get_world_size(), config.model, tokens_mBS.shape[-1] - 1
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
            model = GPTModel(
                options,
                get_gpt_layer_local_spec(normalization="RMSNorm"),
                vocab_size=shape.vocab_size,
                max_sequence_length=positions,
                position_embedding_type="rope",
                share_embeddings_and_output_weights=False,
            )
            hidden = torch.ones(1, 1, positions, positions, dtype=torch.bool).triu(1)

            def step() -> None:
                for tokens in tokens_mBS:
                    places = torch.arange(positions).expand(len(tokens), -1)
                    model(tokens[:, :-1], places, hidden, labels=tokens[:, 1:].contiguous()).sum().backward()

            traffic = _twice(step)
            parallel_state.destroy_model_parallel()
            return traffic

    return count


@contextlib.contextmanager
def _megatron_on_cpu() -> Iterator[None]:
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


PEERS: dict[str, tuple[str, Peer]] = {
    "torch DDP": ("DDP (ZeRO 0)", torch_ddp),
    "DeepSpeed ZeRO 1": ("ZeRO 1", deepspeed_zero(1)),
    "DeepSpeed ZeRO 2": ("ZeRO 2", deepspeed_zero(2)),
    "DeepSpeed ZeRO 3": ("ZeRO 3", deepspeed_zero(3)),
    "megatron-core tensor": ("tensor", megatron_core(False)),
    "megatron-core tensor + sequence": ("tensor + sequence", megatron_core(True)),
}
"""Name -> our axis of the same kind, and the peer."""
