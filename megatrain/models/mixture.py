"""Mixture of experts: a router sends each token to k of E feed-forwards (Shazeer et al. 2017).

Nothing here depends on which other sequences share a micro-batch: balance and capacity are counted over one
sequence, so that no layout changes them. Shapes: S sequence, B micro-batch, D width, E experts, k experts of a
token, G groups of experts.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatrain.config.schema import ModelConfig
from megatrain.parallel.layers import Layers


class Routing(NamedTuple):
    """Experts [S, B, k] of each token (number E where its expert had no room) and the gates that weigh them."""

    experts: Tensor
    gates: Tensor


class MixtureOfExperts(nn.Module):
    """Routed experts, plus shared ones that every token passes (Dai et al. 2024, eq. 9)."""

    def __init__(self, config: ModelConfig, layers: Layers, experts: nn.Module, shared: nn.Module | None):
        super().__init__()
        self.layers = layers
        self.router = layers.in_split_region(Router(config, layers))
        self.experts, self.shared = experts, shared

    @torch.compiler.disable  # how many rows an expert has depends on the data: no graph can hold it
    def forward(self, x_SBD: Tensor) -> Tensor:
        tokens_SBD = self.layers.enter_experts(x_SBD)
        routing = self.router(tokens_SBD)
        mixed_TD = self.experts(tokens_SBD.flatten(0, 1), routing.experts.flatten(0, 1), routing.gates.flatten(0, 1))
        y_SBD = self.layers.leave_experts(mixed_TD.view_as(tokens_SBD))
        return y_SBD if self.shared is None else y_SBD + self.shared(x_SBD)


class Router(nn.Module):
    """Chooses the experts of each token and weighs them, in FP32 throughout.

    A balance bias moves the choice and not the gates, so it needs no gradient (Wang et al. 2024).
    """

    def __init__(self, config: ModelConfig, layers: Layers):
        super().__init__()
        assert config.num_experts is not None
        self.config, self.layers, self.num_experts = config, layers, config.num_experts
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.state = layers.router_state(config.num_experts)

    def forward(self, x_SBD: Tensor) -> Routing:
        experts_SBk, gates_SBk, *learned = self.route(x_SBD)
        return Routing(experts_SBk, self.state.attach(gates_SBk, *learned) if learned else gates_SBk)

    def route(self, x_SBD: Tensor) -> tuple[Tensor, ...]:
        """Experts and gates; while training also the side loss and the statistics of the choice."""
        logits_SBE = F.linear(x_SBD.float(), self.weight.float())
        scores_SBE = SCORES[self.config.router_score](logits_SBE)
        experts_SBk = self._choose(scores_SBE.detach() + self.state.bias_E)
        gates_SBk = scores_SBE.gather(-1, experts_SBk)
        if self.config.router_normalize:
            gates_SBk = gates_SBk / gates_SBk.sum(-1, keepdim=True)
        gates_SBk = gates_SBk * self.config.router_scale
        chosen_SBE = torch.zeros_like(scores_SBE, dtype=torch.bool).scatter(-1, experts_SBk, True)
        kept_SBE = chosen_SBE if self.config.expert_capacity is None else self._within_capacity(chosen_SBE)
        kept_SBk = kept_SBE.gather(-1, experts_SBk)
        routing = experts_SBk.masked_fill(~kept_SBk, self.num_experts), gates_SBk * kept_SBk
        if not (self.training and torch.is_grad_enabled()):
            return routing
        probabilities_SBE = scores_SBE / scores_SBE.sum(-1, keepdim=True)
        side_loss = self._side_loss(logits_SBE, probabilities_SBE, chosen_SBE)
        return *routing, side_loss, self.state.count(chosen_SBE, kept_SBE, probabilities_SBE)

    def _choose(self, wanted_SBE: Tensor) -> Tensor:
        """The k best experts, of the best groups only where these are limited (DeepSeek-AI 2024, section 2.1.2)."""
        config = self.config
        if config.router_groups_per_token < config.router_groups:
            by_group = wanted_SBE.unflatten(-1, (config.router_groups, -1))
            best_SBG = by_group.topk(min(2, by_group.shape[-1])).values.sum(-1)
            groups = best_SBG.topk(config.router_groups_per_token).indices
            allowed_SBG = torch.zeros_like(best_SBG, dtype=torch.bool).scatter(-1, groups, True)
            wanted_SBE = by_group.masked_fill(~allowed_SBG[..., None], -math.inf).flatten(-2)
        return wanted_SBE.topk(config.experts_per_token).indices

    def _within_capacity(self, chosen_SBE: Tensor) -> Tensor:
        """The choices that find room: an expert takes a sequence's tokens in order, up to its capacity."""
        assert self.config.expert_capacity is not None
        whole_SBE = self.layers.whole_sequence(chosen_SBE)
        share = self.config.experts_per_token * whole_SBE.shape[0] / self.num_experts
        capacity = math.ceil(self.config.expert_capacity * share)
        has_room = whole_SBE.cumsum(0) <= capacity
        return chosen_SBE & has_room[self.layers.positions(chosen_SBE.shape[0], chosen_SBE.device)]

    def _side_loss(self, logits_SBE: Tensor, probabilities_SBE: Tensor, chosen_SBE: Tensor) -> Tensor:
        """What is added to the sum of the token losses: the weighted losses of the tokens that are here.

        Balance (Fedus et al. 2021, eq. 4, over each sequence like DeepSeek-AI 2024, eq. 17): E x sum over experts of
        the share of choices x mean probability, 1 where both are even, counted once per token of the sequence.
        z (Zoph et al. 2022, eq. 5): squared logarithm of the softmax's denominator.
        """
        loss = logits_SBE.new_zeros(())
        if self.config.router_balance_loss:
            chosen_BE = self.layers.sum_over_sequence(chosen_SBE.sum(0))
            share_BE = chosen_BE / chosen_BE.sum(-1, keepdim=True)
            balance = self.num_experts * (share_BE * probabilities_SBE.sum(0)).sum()
            loss = loss + self.config.router_balance_loss * balance
        if self.config.router_z_loss:
            loss = loss + self.config.router_z_loss * logits_SBE.logsumexp(-1).square().sum()
        return loss


def load_router_biases(model: nn.Module, saved: Mapping[str, list[float]]) -> None:
    """Sets the balance biases [E] of a whole model by their canonical names; those of other layers stay zero."""
    for name, module in model.named_modules():
        if isinstance(module, Router) and f"{name}.balance_bias" in saved:
            module.state.bias_E.copy_(torch.tensor(saved[f"{name}.balance_bias"]))


SCORES: dict[str, Callable[[Tensor], Tensor]] = {"softmax": lambda logits: logits.softmax(-1), "sigmoid": torch.sigmoid}
