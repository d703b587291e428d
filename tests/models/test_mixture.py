"""The router's rules one by one, and the mixture against the same sum written out expert by expert."""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatrain.config.reading.fields import with_value
from megatrain.config.schema import TrainConfig
from megatrain.models.build import build_model
from megatrain.models.parts.experts import grouped_matmul
from megatrain.models.parts.mixture import MixtureOfExperts, Router
from megatrain.models.parts.sublayers import MicroBatch
from megatrain.parallel.layers import Layers
from megatrain.spec.counts import num_parameters
from megatrain.spec.derive import mixture_layers
from megatrain.spec.schema import ModelSpec
from tests.configs import model_spec

S, B, D, E = 12, 3, 16, 6
Z = 0.1


def config(fields: Mapping[str, Any] = MappingProxyType({})) -> ModelSpec:
    defaults: dict[str, Any] = {
        "num_layers": 3, "hidden_size": D, "attention.num_heads": 2, "feed_forward.hidden_size": 24, "vocab_size": 32,
        "max_seq_len": S, "experts.num_experts": E, "experts.hidden_size": 8,
    }  # fmt: skip
    return model_spec({**defaults, **fields})


def router(fields: Mapping[str, Any] = MappingProxyType({})) -> Router:
    made = Router(config(fields), Layers())
    torch.nn.init.normal_(made.weight, generator=torch.Generator().manual_seed(1))
    made.state.begin_step(1.0)
    return made


def tokens(seed: int = 0) -> Tensor:
    return torch.randn(S, B, D, generator=torch.Generator().manual_seed(seed))


def mixture(fields: Mapping[str, Any] = MappingProxyType({})) -> MixtureOfExperts:
    layer = build_model(config(fields), seed=1).layers["1"].feed_forward
    assert isinstance(layer, MixtureOfExperts)
    torch.nn.init.normal_(layer.router.weight, generator=torch.Generator().manual_seed(1))
    return layer


def written_out(layer: MixtureOfExperts, x: Tensor) -> Tensor:
    """sum over experts of gate x expert(x), token by token."""
    routing, experts = layer.router(x), layer.experts
    y = torch.zeros_like(x) if layer.shared is None else layer.shared(x, MicroBatch())
    for s in range(x.shape[0]):
        for b in range(x.shape[1]):
            for e, gate in zip(routing.experts[s, b].tolist(), routing.gates[s, b], strict=True):
                if e < layer.router.num_experts:
                    token, up = x[s, b], experts.up[e]
                    if hasattr(experts, "gate"):
                        hidden = F.silu(token @ experts.gate[e]) * (token @ up)
                    else:
                        hidden = F.gelu(token @ up, approximate="tanh")
                    y[s, b] = y[s, b] + gate * (hidden @ experts.down[e])
    return y


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"family": "gpt", "experts.num_shared": 2, "experts.per_token": 3},
        {"router.score": "sigmoid", "router.normalize": False, "router.scale": 2.0, "experts.capacity": 0.5},
        {"experts.hidden_size": 7},  # rows that torch's grouped product refuses: the loop
    ],
    ids=["swiglu", "gelu-shared", "sigmoid-capacity", "odd-width"],
)
def test_a_mixture_is_the_sum_of_its_experts(fields: dict[str, Any]) -> None:
    layer, x = mixture(fields).eval(), tokens()
    torch.testing.assert_close(layer(x, MicroBatch()), written_out(layer, x), rtol=1e-5, atol=1e-6)


def test_grouped_product_also_of_nothing() -> None:
    weight = torch.randn(3, 8, 4, requires_grad=True)
    rows = torch.randn(5, 8)
    product = grouped_matmul(rows, weight, torch.tensor([2, 0, 3]))
    torch.testing.assert_close(product, torch.cat([rows[:2] @ weight[0], rows[2:] @ weight[2]]))
    grouped_matmul(rows[:0], weight, torch.tensor([0, 0, 0])).sum().backward()
    assert weight.grad is not None and not weight.grad.any(), "an idle rank has a gradient, of zeros, to reduce"


def test_gates_of_softmax_and_sigmoid() -> None:
    x = tokens()
    mixed = router()  # normalised softmax over all = softmax over the chosen
    logits = F.linear(x, mixed.weight)
    experts, gates = mixed(x)
    torch.testing.assert_close(gates, logits.gather(-1, experts).softmax(-1))
    single = router({"router.score": "sigmoid", "router.normalize": False, "router.scale": 3.0})
    experts, gates = single(x)
    torch.testing.assert_close(gates, 3.0 * logits.gather(-1, experts).sigmoid())
    assert torch.equal(experts, logits.topk(2).indices)


def test_the_bias_moves_the_choice_and_not_the_gates() -> None:
    made, x = router({"router.score": "sigmoid", "router.normalize": False}), tokens()
    made.state.bias_E = torch.tensor([0.0, 0.0, 0.0, 0.0, 10.0, 0.0])
    experts, gates = made(x)
    assert (experts == 4).any(-1).all()
    torch.testing.assert_close(gates, F.linear(x, made.weight).sigmoid().gather(-1, experts))


def test_limited_groups() -> None:
    made, x = router({"router.groups": 3, "router.groups_per_token": 1}), tokens()
    scores = F.linear(x, made.weight).softmax(-1)
    best = scores.unflatten(-1, (3, 2)).sum(-1).argmax(-1)
    experts, _ = made(x)
    assert torch.equal(experts // 2, best[..., None].expand(-1, -1, 2))


def test_limited_groups_hold_where_biases_make_scores_negative() -> None:
    made = router({"router.score": "sigmoid", "router.groups": 3, "router.groups_per_token": 1})
    made.state.bias_E = torch.full((E,), -3.0)
    experts, _ = made.eval()(tokens())
    assert torch.equal(experts[..., 0] // 2, experts[..., 1] // 2), "both of one group"


def test_capacity_drops_what_comes_late_in_each_sequence() -> None:
    free, limited, x = router(), router({"experts.capacity": 0.75}), tokens()
    capacity = math.ceil(0.75 * 2 * S / E)
    wanted, (kept, gates) = free(x).experts, limited(x)
    seen: dict[tuple[int, int], int] = {}
    dropped = 0
    for s in range(S):
        for b in range(B):
            for slot, e in enumerate(wanted[s, b].tolist()):
                seen[b, e] = seen.get((b, e), 0) + 1
                has_room = seen[b, e] <= capacity
                dropped += not has_room
                assert kept[s, b, slot] == (e if has_room else E)
                assert (gates[s, b, slot] > 0) == has_room
    gates.sum().backward()
    assert 0 < dropped == int(limited.state.statistics[E])


def test_side_losses_are_added_to_the_token_losses() -> None:
    made, x = router({"router.balance_loss": 0.3, "router.z_loss": Z, "experts.per_token": 3}), tokens()
    made.state.begin_step(0.5)
    made(x).gates.mul(torch.randn(S, B, 3, generator=torch.Generator().manual_seed(2))).sum().backward()
    found, made.weight.grad = made.weight.grad, None

    logits = F.linear(x, made.weight)
    probabilities = logits.softmax(-1)
    chosen = torch.zeros_like(logits).scatter(-1, logits.topk(3).indices, 1.0)
    balance = sum(
        E * (chosen[:, b].mean(0) / 3 * probabilities[:, b].mean(0)).sum() * S for b in range(B)
    )  # S times: once per token
    side = 0.3 * balance + Z * logits.logsumexp(-1).square().sum()
    gates = probabilities.gather(-1, logits.topk(3).indices)
    gates = gates / gates.sum(-1, keepdim=True)
    token_losses = (gates * torch.randn(S, B, 3, generator=torch.Generator().manual_seed(2))).sum()
    (token_losses + 0.5 * side).backward()
    assert made.weight.grad is not None and found is not None
    torch.testing.assert_close(found, made.weight.grad)


def side_gradient(made: Router, x: Tensor, lengths: Tensor | None = None) -> Tensor:
    """What the side losses alone add to the gradient of the router's weight."""
    made.weight.grad = None
    (made(x, lengths).gates * 0.0).sum().backward()
    assert made.weight.grad is not None
    return made.weight.grad


def test_the_balance_loss_counts_the_choice_without_the_bias() -> None:
    """DeepSeek-AI 2024 (V3), eq. 17 to 20: the share of the top k of the affinities, as they are without the bias."""
    made, x = router({"router.balance_loss": 0.3, "router.score": "sigmoid"}), tokens()
    made.state.bias_E = torch.tensor([0.0, 0.0, 0.0, 0.0, 10.0, 0.0])
    found = side_gradient(made, x)
    assert made.state.statistics[4] == S * B, "the bias moves the choice"

    weight = made.weight.detach().clone().requires_grad_()
    affinities = (x @ weight.T).sigmoid()
    fractions = affinities / affinities.sum(-1, keepdim=True)
    loss = torch.zeros(())
    for b in range(B):
        for e in range(E):
            chosen = sum(e in affinities[s, b].topk(2).indices for s in range(S))
            loss = loss + S * (E / (2 * S) * chosen) * fractions[:, b, e].mean()
    (0.3 * loss).backward()
    assert weight.grad is not None
    torch.testing.assert_close(found, weight.grad)


def test_padding_counts_in_no_loss_and_no_statistic() -> None:
    """A sequence and its padding have the side losses and statistics of the sequence alone."""
    fields = {"router.balance_loss": 0.3, "router.z_loss": Z, "experts.capacity": 0.75}
    x, lengths = tokens(), (7, 0, S)
    padded, alone = router(fields), router(fields)
    found = side_gradient(padded, x, torch.tensor(lengths))

    weight = alone.weight.detach().clone().requires_grad_()
    loss = torch.zeros(())
    capacity = math.ceil(0.75 * 2 * S / E)
    chosen_E, dropped, entropy = torch.zeros(E, dtype=torch.int64), 0, 0.0
    for b, length in enumerate(lengths):
        own_E = torch.zeros(E, dtype=torch.int64)
        logits = x[:length, b] @ weight.T
        probabilities = logits.softmax(-1)
        for s in range(length):
            loss = loss + Z * logits[s].exp().sum().log() ** 2
            own_E[logits[s].topk(2).indices] += 1
            entropy -= float((probabilities[s] * probabilities[s].log()).sum().detach())
        if length:
            loss = loss + 0.3 * length * E * (own_E / (2 * length) * probabilities.mean(0)).sum()
        chosen_E += own_E
        dropped += int((own_E - capacity).clamp_min(0).sum())
    loss.backward()
    assert weight.grad is not None and dropped > 0
    torch.testing.assert_close(found, weight.grad)
    *counts, drops, sum_of_entropies, number = padded.state.statistics.tolist()
    assert (counts, drops, number) == (chosen_E.tolist(), dropped, sum(lengths))
    assert sum_of_entropies == pytest.approx(entropy, rel=1e-5)


def test_even_routing_has_a_balance_loss_of_one_per_token() -> None:
    made = router({"router.balance_loss": 1.0})
    logits = torch.zeros(S, B, E)
    chosen = torch.zeros(S, B, E, dtype=torch.bool)
    for s in range(S):
        chosen[s, :, [2 * s % E, (2 * s + 1) % E]] = True
    assert float(made._side_loss(logits, logits.softmax(-1), chosen)) == pytest.approx(S * B)


def test_statistics_count_training_only() -> None:
    made, x = router(), tokens()
    for _ in range(2):
        made(x).gates.sum().backward()
    *chosen, dropped, entropy, count = made.state.statistics.tolist()
    assert (sum(chosen), dropped, count) == (2 * S * B * 2, 0, 2 * S * B)
    probabilities = F.linear(x, made.weight).softmax(-1)
    assert entropy == pytest.approx(-2 * float((probabilities * probabilities.log()).sum().detach()), rel=1e-5)
    made.eval()(x)
    with torch.no_grad():
        made.train()(x)
    assert made.state.statistics[-1] == 2 * S * B


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_counted_parameters_are_those_of_the_model(family: str) -> None:
    made = config({"family": family, "experts.num_dense_layers": 1, "experts.num_shared": 2})
    assert mixture_layers(made) == range(1, 3)
    weights = {name: p.numel() for name, p in build_model(made, seed=1).named_parameters()}
    assert num_parameters(made) == sum(weights.values())
    idle = sum(n for name, n in weights.items() if ".experts." in name) * (E - 2) // E
    assert num_parameters(made, active=True) == sum(weights.values()) - idle


def test_experts_may_stand_in_every_other_block() -> None:
    """Qwen's decoder_sparse_step: block i has experts where i + 1 is a multiple."""
    made = config({"num_layers": 6, "experts.interval": 2})
    assert list(mixture_layers(made)) == [1, 3, 5]
    assert list(mixture_layers(with_value(made, "experts.num_dense_layers", 2))) == [3, 5]
    model = build_model(made, seed=1)
    assert [hasattr(block.feed_forward, "router") for block in model.layers.values()] == [False, True] * 3


def test_recomputed_routing_is_identical() -> None:
    """Activation checkpointing: the same experts, the same gradients to the bit, no second count of the loads."""
    from megatrain.models.recompute import apply_recompute

    results = []
    for mode in ("none", "full", "feed_forward", "budget"):
        model = build_model(config({"experts.capacity": 1.0, "router.z_loss": 0.01, "dropout": 0.1}), seed=1)
        apply_recompute(model, TrainConfig.model_validate({"activation_checkpointing": mode}))
        routers = [m for m in model.modules() if isinstance(m, Router)]
        for made in routers:
            made.state.begin_step(1.0)
        batch = torch.randint(0, 32, (B, S), generator=torch.Generator().manual_seed(3))
        model(batch, batch.roll(-1, 1), torch.arange(B)).sum().backward()
        loads = [m.state.statistics for m in routers]
        results.append((loads, {name: p.grad for name, p in model.named_parameters()}))
    loads, gradients = results[0]
    for again, recomputed in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(loads, again, strict=True))
        assert all(torch.equal(gradients[name], recomputed[name]) for name in gradients)


@pytest.mark.slow  # the compiler takes most of a minute
def test_a_compiled_block_leaves_its_mixture_alone() -> None:
    losses = []
    for compiled in (False, True):
        model = build_model(config(), seed=1)
        if compiled:
            for block in model.layers.values():
                block.compile()
        batch = torch.randint(0, 32, (B, S), generator=torch.Generator().manual_seed(3))
        losses.append(model(batch, batch.roll(-1, 1), torch.arange(B)))
        losses[-1].sum().backward()
    torch.testing.assert_close(losses[0], losses[1])
