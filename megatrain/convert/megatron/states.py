"""What Megatron-core's optimizers keep: keys of the states of a parameter, and what all parameters share.

It has three optimizers around AdamW: the distributed one, one with FP32 masters and one for FP32 weights. Each asks for
other names, and finds them all in what is written here.
"""

from collections.abc import Mapping
from typing import Any

import torch

from megatrain.convert.table import adam_group

MASTERS = ("param", "fp32_param")
"""Names of FP32 masters: of the distributed optimizer (``fully_reshardable``), of the one that is not."""
CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
"""How tensors are arranged and named: Megatron-LM asks for them as the checkpoint says here."""
_DECAYS = (1.0, 0.0)
"""As Megatron-LM groups its parameters: matrices with weight decay, the rest without."""


def state_key(kind: str, key: str) -> str:
    """The key of a parameter's state."""
    return f"optimizer.state.{kind}.{key}"


def common_states(step: int, adam: Mapping[str, Any], own_for_experts: bool) -> dict[Any, Any]:
    """What the parameters share: groups and step. Sharded or not, all optimizers find theirs.

    Args:
        adam: arguments of the run's AdamW; its defaults for the rest.
        own_for_experts: experts have an optimizer of their own, as they have where they are spread over ranks.
    """
    whole = _states(_groups(step, adam, _DECAYS, expert=False))
    return {0: whole, 1: _states(_groups(step, adam, _DECAYS[:1], expert=True))} if own_for_experts else whole


def _states(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The states: they stand at the top for the optimizer of FP32 weights, and under ``optimizer`` for the others.

    The first is taken for one around torch's AdamW, whose parameters have a step each, the others for ones around that
    of Transformer Engine or Apex, which has it in the groups: neither loads what the other needs.
    """
    step = torch.tensor(float(groups[0]["step"]))
    return {
        "param_groups": groups,
        "state": {"common_step": step},
        "optimizer": {"param_groups": groups, "state": {}},
        "param_state_sharding_type": CONTENT["distrib_optim_sharding_type"],
    }


def _groups(step: int, adam: Mapping[str, Any], decays: tuple[float, ...], expert: bool) -> list[dict[str, Any]]:
    settings = adam_group(adam)
    decay = settings["weight_decay"]
    del settings["params"]
    settings |= {"bias_correction": True}  # a setting of Transformer Engine's and Apex's AdamW, which has no other
    settings |= {"lr_mult": 1.0, "is_decoupled_lr": False, "default_config": True, "is_expert_parallel": expert}
    return [{**settings, "wd_mult": factor, "weight_decay": decay * factor, "step": step} for factor in decays]
