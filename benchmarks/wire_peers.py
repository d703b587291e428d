"""What torch, DeepSpeed and megatron-core send by themselves: the same model, batch and ranks, their own defaults."""

import contextlib
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.peer_models import megatron_model, megatron_on_cpu
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
        with megatron_on_cpu():
            from megatron.core import parallel_state

            positions = tokens_mBS.shape[-1] - 1
            model = megatron_model(config, dist.get_world_size(), sequence_parallel, positions)
            hidden = torch.ones(1, 1, positions, positions, dtype=torch.bool).triu(1)

            def step() -> None:
                for tokens in tokens_mBS:
                    places = torch.arange(positions).expand(len(tokens), -1)
                    model(tokens[:, :-1], places, hidden, labels=tokens[:, 1:].contiguous()).sum().backward()

            traffic = _twice(step)
            parallel_state.destroy_model_parallel()
            return traffic

    return count


PEERS: dict[str, tuple[str, Peer]] = {
    "torch DDP": ("DDP (ZeRO 0)", torch_ddp),
    "DeepSpeed ZeRO 1": ("ZeRO 1", deepspeed_zero(1)),
    "DeepSpeed ZeRO 2": ("ZeRO 2", deepspeed_zero(2)),
    "DeepSpeed ZeRO 3": ("ZeRO 3", deepspeed_zero(3)),
    "megatron-core tensor": ("tensor", megatron_core(False)),
    "megatron-core tensor + sequence": ("tensor + sequence", megatron_core(True)),
}
"""Name -> our axis of the same kind, and the peer."""
