"""Mixture of experts, token by token of each sequence (docs/experts.md).

Shapes: B sequences, S positions, D width, E experts, k experts of a token.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.reference.feed_forward import activated, feed_forward


@dataclass(frozen=True)
class RouterStatistics:
    """Of some sequences: ``counts_E`` choices of each expert, dropped ones among them; sum of entropies; tokens."""

    counts_E: Tensor
    dropped: int
    entropy: float
    tokens: int


def mixture(
    model: dict[str, Any],
    weights: dict[str, Tensor],
    name: str,
    x_BSD: Tensor,
    real_BS: Tensor,
    bias_E: Tensor | None,
) -> tuple[Tensor, Tensor, RouterStatistics]:
    """Output, side loss and statistics of one block. Padding, where ``real_BS`` is false, counts in neither."""
    logits = x_BSD @ weights[f"{name}.router.weight"].T
    scores = logits.softmax(-1) if model["router.score"] == "softmax" else 1 / (1 + torch.exp(-logits))
    chosen = _chosen(model, scores.detach() + (0 if bias_E is None else bias_E))  # B, S, E, true or not
    gates = torch.where(chosen, scores, 0.0)
    if model["router.normalize"]:
        gates = gates / gates.sum(-1, keepdim=True)
    kept = chosen & _has_room(model, chosen)
    gates = torch.where(kept, gates * model["router.scale"], 0.0)
    y = torch.zeros_like(x_BSD)
    for expert in range(model["experts.num_experts"]):
        y = y + gates[..., expert, None] * _expert(model, weights, name, expert, x_BSD)
    if model["experts.num_shared"]:  # Dai et al. 2024, eq. 9
        y = y + feed_forward(model, weights, f"{name}.shared", x_BSD)
    chances = scores / scores.sum(-1, keepdim=True)
    statistics = RouterStatistics(
        chosen[real_BS].sum(0),
        int(chosen[real_BS].sum() - kept[real_BS].sum()),
        float(-(chances * chances.log())[real_BS].sum()),
        int(real_BS.sum()),
    )
    # DeepSeek-AI 2024, eq. 18: the choice that would be made without a bias
    sequences = zip(logits, chances, _chosen(model, scores.detach()), real_BS, strict=True)
    lost = [_side_loss(model, *(part[real_S] for part in parts)) for *parts, real_S in sequences if real_S.any()]
    return y, sum(lost, torch.zeros((), dtype=torch.float64)), statistics


def _expert(model: dict[str, Any], weights: dict[str, Tensor], name: str, expert: int, x: Tensor) -> Tensor:
    matrices = {kind: weights.get(f"{name}.experts.{kind}") for kind in ("up", "gate", "down")}
    up, gate, down = (None if whole is None else whole[expert] for whole in matrices.values())
    assert up is not None and down is not None
    return activated(x @ up, None if gate is None else x @ gate) @ down


def _chosen(model: dict[str, Any], wanted_BSE: Tensor) -> Tensor:
    """DeepSeek-AI 2024 (V3), section 2.1.2: from the groups whose two best experts add up highest, the k best."""
    groups, allowed = model["router.groups"], model["router.groups_per_token"]
    if allowed < groups:
        by_group = wanted_BSE.unflatten(-1, (groups, -1)).sort(-1, descending=True).values
        strength = by_group[..., :2].sum(-1)
        rank = (strength[..., None, :] > strength[..., :, None]).sum(-1)  # how many groups are better
        wanted_BSE = wanted_BSE.masked_fill((rank >= allowed).repeat_interleave(by_group.shape[-1], -1), -math.inf)
    better = (wanted_BSE[..., None, :] > wanted_BSE[..., :, None]).sum(-1)
    return better < model["experts.per_token"]


def _has_room(model: dict[str, Any], chosen_BSE: Tensor) -> Tensor:
    """An expert takes of each sequence its first ``expert_capacity`` even shares, rounded up (Fedus et al. 2021)."""
    if model["experts.capacity"] is None:
        return torch.ones_like(chosen_BSE)
    even = chosen_BSE.shape[1] * model["experts.per_token"] / model["experts.num_experts"]
    before = chosen_BSE.cumsum(1) - chosen_BSE.long()
    return before < math.ceil(model["experts.capacity"] * even)


def _side_loss(model: dict[str, Any], logits_SE: Tensor, chances_SE: Tensor, chosen_SE: Tensor) -> Tensor:
    """Of one sequence: balance (Fedus et al. 2021, eq. 4; DeepSeek-AI 2024, eq. 17) and z-loss (Zoph et al. 2022,
    eq. 5). Both count once for each token."""
    tokens, experts = chances_SE.shape
    share_E = chosen_SE.sum(0) / chosen_SE.sum()
    balance = experts * (share_E * chances_SE.mean(0)).sum()
    z = logits_SE.exp().sum(-1).log().square().mean()
    return tokens * (model["router.balance_loss"] * balance + model["router.z_loss"] * z)
