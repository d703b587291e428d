"""Mixture of experts: a router sends each token to k of E feed-forwards (Shazeer et al. 2017).

Nothing here depends on which other sequences share a micro-batch: balance and capacity are counted over one
sequence, so that no layout changes them. Padding is routed, but counts in no loss and no statistic.
Shapes: S sequence, B micro-batch, D width, E experts, k experts of a token, G groups of experts.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatrain.models.parts.experts import EXPERTS, GeluExperts
from megatrain.models.parts.feed_forward import build_feed_forward
from megatrain.models.parts.sublayers import FeedForward, MicroBatch
from megatrain.parallel.layers import Layers
from megatrain.spec.schema import ModelSpec


class Routing(NamedTuple):
    """Experts [S, B, k] of each token (number E where its expert had no room) and the gates that weigh them."""

    experts: Tensor
    gates: Tensor


class MixtureOfExperts(FeedForward):
    """Routed experts, plus shared ones that every token passes (Dai et al. 2024, eq. 9)."""

    def __init__(self, config: ModelSpec, layers: Layers, experts: GeluExperts, shared: FeedForward | None):
        super().__init__()
        self.layers = layers
        self.router: Router = layers.in_split_region(Router(config, layers))  # type: ignore[assignment]
        self.experts, self.shared = experts, shared

    @torch.compiler.disable  # how many rows an expert has depends on the data: no graph can hold it
    def forward(self, x_SBD: Tensor, batch: MicroBatch) -> Tensor:
        tokens_SBD = self.layers.enter_experts(x_SBD)
        routing = self.router(tokens_SBD, batch.lengths_B)
        mixed_TD = self.experts(tokens_SBD.flatten(0, 1), routing.experts.flatten(0, 1), routing.gates.flatten(0, 1))
        y_SBD = self.layers.leave_experts(mixed_TD.view_as(tokens_SBD))
        return y_SBD if self.shared is None else y_SBD + self.shared(x_SBD, batch)

    def compile_parts(self) -> None:
        if self.shared is not None:
            self.shared.compile()
        self.router.route = torch.compile(self.router.route)  # type: ignore[method-assign]
        self.experts.activate = torch.compile(self.experts.activate)
        self.experts.exchange.compile()


class Router(nn.Module):
    """Chooses the experts of each token and weighs them, in FP32 throughout.

    A balance bias moves the choice and not the gates, so it needs no gradient (Wang et al. 2024).
    """

    def __init__(self, config: ModelSpec, layers: Layers):
        super().__init__()
        self.config, self.layers, self.num_experts = config, layers, config.experts.num_experts
        self.weight = nn.Parameter(torch.empty(config.experts.num_experts, config.hidden_size))
        self.state = layers.router_state(config.experts.num_experts)

    def forward(self, x_SBD: Tensor, lengths_B: Tensor | None = None) -> Routing:
        experts_SBk, gates_SBk, *learned = self.route(x_SBD, lengths_B)
        return Routing(experts_SBk, self.state.attach(gates_SBk, *learned) if learned else gates_SBk)

    def route(self, x_SBD: Tensor, lengths_B: Tensor | None) -> tuple[Tensor, ...]:
        """Experts and gates; while training also the side loss and the statistics of the choice."""
        logits_SBE = F.linear(x_SBD.float(), self.weight.float())
        scores_SBE = SCORES[self.config.router.score](logits_SBE)
        wanted_SBE, bias_E = scores_SBE.detach(), self.state.bias_E
        experts_SBk = self._choose(wanted_SBE if bias_E is None else wanted_SBE + bias_E)
        gates_SBk = scores_SBE.gather(-1, experts_SBk)
        if self.config.router.normalize:
            gates_SBk = gates_SBk / gates_SBk.sum(-1, keepdim=True)
        gates_SBk = gates_SBk * self.config.router.scale
        chosen_SBE = _marked(experts_SBk, wanted_SBE)
        capacity = self.config.experts.capacity
        kept_SBE = chosen_SBE if capacity is None else self._within_capacity(chosen_SBE, capacity)
        kept_SBk = kept_SBE.gather(-1, experts_SBk)
        routing = experts_SBk.masked_fill(~kept_SBk, self.num_experts), gates_SBk * kept_SBk
        if not (self.training and torch.is_grad_enabled()):
            return routing
        probabilities_SBE = scores_SBE / scores_SBE.sum(-1, keepdim=True)
        unbiased = bias_E is None or not self.config.router.balance_loss  # where one choice serves both
        preferred_SBE = chosen_SBE if unbiased else _marked(self._choose(wanted_SBE), wanted_SBE)
        real_SB1 = None
        if lengths_B is not None:
            positions_S = self.layers.positions(x_SBD.shape[0], x_SBD.device)
            real_SB1 = (positions_S[:, None] < lengths_B)[..., None]
            chosen_SBE, kept_SBE, preferred_SBE = (x & real_SB1 for x in (chosen_SBE, kept_SBE, preferred_SBE))
            probabilities_SBE = probabilities_SBE * real_SB1
        side_loss = self._side_loss(logits_SBE, probabilities_SBE, preferred_SBE, real_SB1)
        return *routing, side_loss, self.state.count(chosen_SBE, kept_SBE, probabilities_SBE, real_SB1)

    def _choose(self, wanted_SBE: Tensor) -> Tensor:
        """The k best experts, of the best groups only where these are limited (DeepSeek-AI 2024, section 2.1.2)."""
        config = self.config
        if config.router.groups_per_token < config.router.groups:
            by_group = wanted_SBE.unflatten(-1, (config.router.groups, -1))
            best_SBG = by_group.topk(min(2, by_group.shape[-1])).values.sum(-1)
            groups = best_SBG.topk(config.router.groups_per_token).indices
            allowed_SBG = torch.zeros_like(best_SBG, dtype=torch.bool).scatter(-1, groups, True)
            wanted_SBE = by_group.masked_fill(~allowed_SBG[..., None], -math.inf).flatten(-2)
        return wanted_SBE.topk(config.experts.per_token).indices

    def _within_capacity(self, chosen_SBE: Tensor, capacity: float) -> Tensor:
        """The choices that find room: an expert takes a sequence's tokens in order, up to ``capacity`` even shares."""
        whole_SBE = self.layers.whole_sequence(chosen_SBE)
        share = self.config.experts.per_token * whole_SBE.shape[0] / self.num_experts
        has_room = whole_SBE.cumsum(0) <= math.ceil(capacity * share)
        return chosen_SBE & has_room[self.layers.positions(chosen_SBE.shape[0], chosen_SBE.device)]

    def _side_loss(
        self, logits_SBE: Tensor, probabilities_SBE: Tensor, preferred_SBE: Tensor, real_SB1: Tensor | None = None
    ) -> Tensor:
        """What is added to the sum of the token losses: the weighted losses of the tokens that are here.

        Balance (Fedus et al. 2021, eq. 4, over each sequence like DeepSeek-AI 2024, eq. 17 to 20): E x sum over experts
        of the share of choices x mean probability, 1 where both are even, counted once per token of the sequence.
        z (Zoph et al. 2022, eq. 5): squared logarithm of the softmax's denominator.

        Args:
            preferred_SBE: the experts that would be chosen without a balance bias (ibid., eq. 18). No padding's, and
                no padding's ``probabilities_SBE``.
            real_SB1: which tokens are no padding; None: all.
        """
        loss = logits_SBE.new_zeros(())
        if self.config.router.balance_loss:
            preferred_BE = self.layers.sum_over_sequence(preferred_SBE.sum(0))
            share_BE = preferred_BE / preferred_BE.sum(-1, keepdim=True).clamp_min(1)  # a sequence may be all padding
            balance = self.num_experts * (share_BE * probabilities_SBE.sum(0)).sum()
            loss = loss + self.config.router.balance_loss * balance
        if self.config.router.z_loss:
            squares_SB1 = logits_SBE.logsumexp(-1, keepdim=True).square()
            squares_SB1 = squares_SB1 if real_SB1 is None else squares_SB1 * real_SB1
            loss = loss + self.config.router.z_loss * squares_SB1.sum()
        return loss


def build_mixture(config: ModelSpec, layers: Layers) -> MixtureOfExperts:
    """The model's mixture of experts."""
    width = config.experts.num_shared * config.experts.hidden_size
    shared = build_feed_forward(config, width, layers) if width else None
    return MixtureOfExperts(config, layers, EXPERTS[config.feed_forward.activation](config, layers), shared)


def _marked(experts_SBk: Tensor, like_SBE: Tensor) -> Tensor:
    """Whether each expert [S, B, E] is one of the k of a token."""
    return torch.zeros_like(like_SBE, dtype=torch.bool).scatter(-1, experts_SBk, True)


def load_router_biases(model: nn.Module, saved: Mapping[str, list[float]]) -> None:
    """Sets the balance biases [E] of a whole model by their canonical names; other layers stay without one."""
    for name, module in model.named_modules():
        if isinstance(module, Router) and f"{name}.balance_bias" in saved:
            module.state.bias_E = torch.tensor(saved[f"{name}.balance_bias"], device=module.weight.device)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {"softmax": lambda logits: logits.softmax(-1), "sigmoid": torch.sigmoid}
