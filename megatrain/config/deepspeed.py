"""The DeepSpeed config of a run, derived from ours: nobody writes one by hand."""

import math
from typing import Any

from megatrain.config.schema import OffloadConfig, ResolvedRun
from megatrain.spec.counts import num_parameters

DEEPSPEED_BUCKET = 500_000_000
"""Elements that DeepSpeed reduces at once unless it is told otherwise."""


def deepspeed_config(config: ResolvedRun) -> dict[str, Any]:
    """DeepSpeed's config for ``config``.

    Gradient accumulation is ours (``managed_gradient_accumulation`` off): micro-batches are summed, not
    averaged, and a pipeline schedule runs the backward passes itself. Learning rate and optimizer
    come as objects.
    """
    train, parallel = config.train, config.parallel
    # ZeRO 0 is ZeRO 1 whose states are shared by one rank: engine/mpu.py says why
    zero_stage, sharing_ranks = (parallel.zero_stage, parallel.cp * parallel.dp) if parallel.zero_stage else (1, 1)
    micro_batches = train.global_batch_size // (train.micro_batch_size * parallel.dp)
    derived: dict[str, Any] = {
        "train_batch_size": train.micro_batch_size * micro_batches * sharing_ranks,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.optimizer.grad_clip,
        "steps_per_print": 2**31,
        "zero_optimization": {
            "stage": zero_stage,
            "overlap_comm": False,
            "reduce_bucket_size": DEEPSPEED_BUCKET,
            "use_multi_rank_bucket_allreduce": False,  # each partition to its rank: half the bytes of an all-reduce
            # in one buffer: else ZeRO 1 all-reduces, and sums experts as if all ranks held the same
            "contiguous_gradients": parallel.zero_stage > 0 or parallel.ep > 1,
            **_offload(config.offload),
        },
        "zero_allow_untested_optimizer": True,  # ours are tested here
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW also runs on the host, without a compiler
        **_precision(config),
    }
    merged = _merge(derived, config.deepspeed)
    # DeepSpeed allocates a whole bucket, and one that holds all gradients holds no more
    zero = merged["zero_optimization"]
    zero["reduce_bucket_size"] = min(zero["reduce_bucket_size"], num_parameters(config.model))
    return merged


def _offload(offload: OffloadConfig) -> dict[str, Any]:
    sections = {"offload_optimizer": offload.optimizer, "offload_param": offload.parameters}
    path = {"nvme_path": offload.nvme_path} if offload.nvme_path else {}
    return {name: {"device": device, **path} for name, device in sections.items() if device != "none"}


def _precision(config: ResolvedRun) -> dict[str, Any]:
    precision = config.precision
    gradients = "fp32" if precision.gradient_dtype == "fp32" else precision.dtype
    accumulate = {"data_types": {"grad_accum_dtype": gradients}, "communication_data_type": gradients}
    if precision.dtype == "bf16":
        return {"bf16": {"enabled": True, "immediate_grad_update": True}, **accumulate}
    if precision.dtype == "fp16":
        scaling = {
            "loss_scale": 0,  # dynamic
            "initial_scale_power": round(math.log2(precision.initial_loss_scale)),
            "loss_scale_window": precision.loss_scale_window,
            "hysteresis": precision.loss_scale_hysteresis,
            "consecutive_hysteresis": True,
            "min_loss_scale": precision.min_loss_scale,
        }
        return {"fp16": {"enabled": True, **scaling}, **accumulate}
    return {}


def _merge(derived: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    merged = dict(derived)
    for key, value in extra.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
