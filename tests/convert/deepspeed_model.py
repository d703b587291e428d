"""A Hugging Face model in DeepSpeed's own engine, as any user trains it, on the ranks of the pool."""

from pathlib import Path
from typing import Any
from unittest import mock

import torch

Tensors = dict[tuple[str, str], torch.Tensor]


def engine_of(folder: str, zero_stage: int, load_universal: bool = False, tensor_ranks: int = 1) -> Any:
    """The model of a Hugging Face folder in an engine with AdamW, decay only for matrices.

    On several ``tensor_ranks`` AutoTP cuts it, and makes the optimizer itself.
    """
    import deepspeed
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": load_universal},
    }
    if tensor_ranks > 1:
        config["tensor_parallel"] = {"autotp_size": tensor_ranks}
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}
        parameters = list(model.parameters())
        return deepspeed.initialize(model=model, model_parameters=parameters, config=config, dist_init_required=False)[
            0
        ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]


def state_of(engine: Any) -> Tensors:
    """(kind, name) -> weight or moment, whole, as DeepSpeed gives them."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):  # it looked before there were moments
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found = {}
    for name, parameter in engine.module.named_parameters():
        found["weight", name] = safe_get_full_fp32_param(parameter).clone()
        for kind in ("exp_avg", "exp_avg_sq"):
            found[kind, name] = safe_get_full_optimizer_state(parameter, kind).clone()
    return found


def train_and_save(folder: str, target: str, zero_stage: int, tensor_ranks: int = 1) -> Tensors:
    """Two steps, then DeepSpeed's checkpoint."""

    linear = torch.nn.functional.linear
    engine = engine_of(folder, zero_stage, tensor_ranks=tensor_ranks)
    try:
        for _ in range(2):
            _step(engine, torch.distributed.get_rank() // tensor_ranks)
        engine.save_checkpoint(target)
        return state_of(engine)
    finally:
        engine.destroy()
        torch.nn.functional.linear = linear  # ZeRO 3 leaves its own behind


def load_universal(folder: str, source: str) -> Tensors:
    """What an engine holds after it loaded a universal checkpoint."""
    engine = engine_of(folder, 1, load_universal=True)
    tag = (Path(source) / "latest_universal").read_text()
    engine.load_checkpoint(source, tag=tag)
    return state_of(engine)


def to_universal(source: str, target: str) -> None:
    """DeepSpeed's own tool, ZeRO -> universal, in this process."""
    from argparse import Namespace

    from deepspeed.checkpoint import ds_to_universal

    ds_to_universal.main(
        Namespace(
            input_folder=source,
            output_folder=target,
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=False,
        )
    )


def to_fp32(source: str) -> dict[str, torch.Tensor]:
    """DeepSpeed's own tool, ZeRO -> whole weights."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    return {name: tensor.clone() for name, tensor in get_fp32_state_dict_from_zero_checkpoint(source).items()}


def save_spread_experts(
    folder: str, target: str, zero_stage: int, data_first: bool = False, bf16: bool = False
) -> Tensors:
    """A Mixtral whose experts DeepSpeed's own layer spreads over two ranks, after two steps; this rank's tensors.

    ``data_first``: neighbours hold the same experts, not the others.
    """
    import deepspeed
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
    from transformers import AutoModelForCausalLM

    class Expert(torch.nn.Module):
        def __init__(self, width: int, expert_width: int):
            super().__init__()
            self.w1, self.w3 = (torch.nn.Linear(width, expert_width, bias=False) for _ in range(2))
            self.w2 = torch.nn.Linear(expert_width, width, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.w2(torch.nn.functional.silu(self.w1(x)) * self.w3(x))

    class Mixture(MoE):
        def forward(self, *values: Any) -> torch.Tensor:
            return super().forward(*values)[0]

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sizes = model.config
    torch.manual_seed(torch.distributed.get_rank())
    for layer in model.model.layers:
        expert = Expert(sizes.hidden_size, sizes.intermediate_size)
        layer.mlp = Mixture(sizes.hidden_size, expert, sizes.num_local_experts, ep_size=2, k=2, drop_tokens=False)
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": zero_stage},
        "use_data_before_expert_parallelism": data_first,
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]
    try:
        return _stepped_and_saved(engine, model, target, zero_stage)
    finally:
        engine.destroy()


def save_with_autoep(folder: str, target: str, zero_stage: int) -> Tensors:
    """A model of Hugging Face's whose experts DeepSpeed's AutoEP spreads over two ranks, after two steps."""
    import deepspeed
    from transformers import AutoModelForCausalLM
    from transformers.utils import output_capturing

    registry = type(output_capturing._CAN_RECORD_REGISTRY)
    get = registry.get  # DeepSpeed 0.19.8 gives it a default, which transformers 5.24's does not take
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    linear = torch.nn.functional.linear
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": zero_stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "expert_parallel": {"enabled": True, "autoep_size": 2, "use_grouped_mm": False},
    }
    with mock.patch.object(registry, "get", lambda self, key, default=None: get(self, key) or default):
        parameters = list(model.parameters())
        engine = deepspeed.initialize(
            model=model, model_parameters=parameters, config=config, dist_init_required=False
        )[0]
    try:
        return _stepped_and_saved(engine, model, target, zero_stage)
    finally:
        engine.destroy()
        torch.nn.functional.linear = linear


def _stepped_and_saved(engine: Any, model: Any, target: str, zero_stage: int) -> Tensors:
    for _ in range(2):
        _step(engine, torch.distributed.get_rank())
    engine.save_checkpoint(target)
    if zero_stage == 0:
        return {("weight", name): parameter.detach().clone() for name, parameter in model.named_parameters()}
    return state_of(engine)


def _step(engine: Any, data_rank: int) -> None:
    tokens = torch.arange(1, 17)[None] + data_rank
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
