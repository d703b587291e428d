"""Optimizers and their parameter groups."""

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from megatrain.config.schema import OptimizerConfig
from megatrain.optim.adafactor import Adafactor
from megatrain.optim.lion import Lion
from megatrain.optim.muon import MatrixPart, Muon
from megatrain.spec.parameter import Parameter


class Place(NamedTuple):
    """``split_dim``: of a parameter, the one that is split over the tensor ranks; ``expert_group``: DeepSpeed's name of
    the ranks over which it reduces experts that are spread over others."""

    split_dim: int | None = None
    expert_group: str | None = None


def _here(parameter: nn.Parameter) -> Place:
    """All of it is on this rank."""
    return Place()


def parameter_groups(
    parameters: list[tuple[str, nn.Parameter]],
    config: OptimizerConfig,
    table: Mapping[str, Parameter],
    place_of: Callable[[nn.Parameter], Place] = _here,
) -> list[dict[str, Any]]:
    """What the ``table`` of the model says of each parameter's role; rules whose pattern fits a name override what they
    set, in order.

    ``parameters``: (canonical name, parameter). Each group says by which factor its learning rate differs
    (``lr_scale``), the ``names`` of its parameters, whether they are matrices that Muon orthogonalises or whose second
    moment Adafactor factors, and which moments its weights have.
    Experts that DeepSpeed reduces over ranks of their own stand apart, as it wants them.
    """
    groups: dict[tuple[float, float, bool, bool, str | None], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in parameters:
        role = table[name].role.treatment
        decay, lr_scale = (config.weight_decay if role.decays else 0.0), 1.0
        for rule in config.rules:
            if fnmatch.fnmatchcase(name, rule.pattern):
                decay = decay if rule.weight_decay is None else rule.weight_decay
                lr_scale = lr_scale if rule.lr_scale is None else rule.lr_scale
        matrix = config.name == "muon" and role.orthogonal
        factored = config.name == "adafactor" and len(table[name].shape) == 2
        spread = place_of(parameter).expert_group
        groups.setdefault((decay, lr_scale, matrix, factored, spread), []).append((name, parameter))
    return [
        {
            "params": [parameter for _, parameter in members],
            "names": [name for name, _ in members],
            "weight_decay": decay,
            "lr_scale": lr_scale,
            "orthogonal": matrix,
            "factored": factored,
            "moments": _moments(config.name, matrix, factored),
            **({} if spread is None else {"name": spread, "moe": True}),
        }
        for (decay, lr_scale, matrix, factored, spread), members in groups.items()
    ]


def build_optimizer(
    parameters: list[tuple[str, nn.Parameter]],
    config: OptimizerConfig,
    table: Mapping[str, Parameter],
    tp_group: dist.ProcessGroup | None = None,
    shard_group: dist.ProcessGroup | None = None,
    place_of: Callable[[nn.Parameter], Place] = _here,
) -> torch.optim.Optimizer:
    """The optimizer of ``config.name``, FP32.

    Args:
        tp_group: ranks that share matrices; shard_group: ranks that share ZeRO's partitions. Muon gathers over both,
            Adafactor sums.
    """
    groups, betas = parameter_groups(parameters, config, table, place_of), (config.beta1, config.beta2)
    if config.name == "lion":
        return Lion(groups, lr=config.lr, betas=betas)
    if config.name in ("adafactor", "muon"):
        for group in groups:
            named = zip(group["names"], group["params"], strict=True)
            split = config.name == "muon" and config.muon_split_qkv
            group["parts"] = [
                MatrixPart.of(p, place_of(p).split_dim, table[name].stacked_rows if split else ()) for name, p in named
            ]
    if config.name == "adafactor":
        return Adafactor(groups, config.lr, tp_group, shard_group)
    if config.name == "muon":
        return Muon(groups, config.lr, betas, config.eps, config.muon_momentum, tp_group, shard_group)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def _moments(optimizer: str, orthogonal: bool, factored: bool) -> tuple[str, ...]:
    """What the optimizer keeps, one number a weight."""
    if optimizer == "adafactor":
        return () if factored else ("exp_avg_sq",)
    return ("exp_avg",) if orthogonal or optimizer == "lion" else ("exp_avg", "exp_avg_sq")
