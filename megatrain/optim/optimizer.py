"""Optimizers and their parameter groups."""

from typing import Any

import torch
from torch import nn

from megatrain.config.schema import OptimizerConfig


def parameter_groups(parameters: list[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; vectors (norms, biases) do not. ``parameters``: (canonical name, parameter)."""
    groups = [
        {"params": [p for _, p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for _, p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [part for group in groups for part in _experts_apart(group)]


def _experts_apart(group: dict[str, Any]) -> list[dict[str, Any]]:
    """Spread experts in a group of their own, with DeepSpeed's marks of one (engine/experts.py); no empty groups."""
    names = {getattr(parameter, "group_name", None): None for parameter in group["params"]}  # in their order
    parts = []
    for name in names:
        members = [p for p in group["params"] if getattr(p, "group_name", None) == name]
        parts.append({**group, "params": members, **({} if name is None else {"name": name, "moe": True})})
    return parts


def build_optimizer(parameters: list[tuple[str, nn.Parameter]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW, fused where the weights are on a GPU."""
    on_gpu = parameters[0][1].is_cuda
    return torch.optim.AdamW(
        parameter_groups(parameters, config.weight_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True if on_gpu else None,
    )
