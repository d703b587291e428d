"""What is recomputed gives the same bits, and what is kept is what the mode says."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from megatrain.config.schema import TrainConfig
from megatrain.models.build import build_model
from megatrain.models.parts.sublayers import MicroBatch
from megatrain.models.recompute import apply_recompute
from megatrain.parallel.dropout import dropout_keys
from tests.layouts import ONE_PROCESS, global_batch, run_config

MODES: list[dict[str, Any]] = [
    {"activation_checkpointing": "full"},
    {"activation_checkpointing": "every_nth", "checkpoint_every_nth": 2},
    {"activation_checkpointing": "attention"},
    {"activation_checkpointing": "feed_forward"},
    {"activation_checkpointing": "budget", "activation_budget": 0.0},
    {"activation_checkpointing": "budget", "activation_budget": 0.4},
    {"activation_checkpointing": "budget", "activation_budget": 1.0},
    {"activation_checkpointing": "none", "offload_activations": True},
    {"activation_checkpointing": "full", "offload_activations": True},
    {"activation_checkpointing": "budget", "activation_budget": 0.4, "offload_activations": True},
]


def model_with(mode: dict[str, Any], family: str = "llama") -> nn.Module:
    config = run_config(family, ONE_PROCESS, model={"dropout": 0.1, "attention.dropout": 0.1})
    model = build_model(config.model, seed=3).train()
    apply_recompute(model, TrainConfig.model_validate(mode))
    return model


def run(model: nn.Module) -> tuple[Tensor, int]:
    """The summed loss of a batch, and the bytes of activations that its graph keeps."""
    batch = global_batch(1)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(batch.tokens, batch.labels, dropout_keys(5, batch.sample_ids))
    return loss.sum(), sum(kept.values())


@pytest.mark.parametrize("family", ["gpt", "llama"])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(str(value) for value in mode.values()))
def test_gradients_have_the_same_bits(mode: dict[str, Any], family: str) -> None:
    plain, changed = model_with({}, family), model_with(mode, family)
    for model in (plain, changed):
        for _ in range(2):  # the second run finds what the first decided
            run(model)[0].backward()
    for (name, parameter), other in zip(plain.named_parameters(), changed.parameters(), strict=True):
        assert parameter.grad is not None and torch.equal(parameter.grad, other.grad), name  # type: ignore[arg-type]


class Calls:
    """Counts the calls of a block's modules, recomputations included."""

    def __init__(self, model: nn.Module):
        self.counts: dict[str, int] = {}
        for name, module in model.named_modules():
            module.register_forward_hook(
                lambda *_, name=name: self.counts.__setitem__(name, self.counts.get(name, 0) + 1)
            )


def test_only_what_the_mode_says_runs_again() -> None:
    for mode, again in [
        ({"activation_checkpointing": "every_nth", "checkpoint_every_nth": 2}, {"layers.0.feed_forward.gate": 2}),
        ({"activation_checkpointing": "every_nth", "checkpoint_every_nth": 2}, {"layers.1.feed_forward.gate": 1}),
        ({"activation_checkpointing": "attention"}, {"layers.0.attention.query_key_value": 1}),
        ({"activation_checkpointing": "attention"}, {"layers.0.attention.core.dropout": 2}),
        ({"activation_checkpointing": "feed_forward"}, {"layers.0.feed_forward.up": 2, "layers.0.attention.output": 1}),
        ({"activation_checkpointing": "full"}, {"layers.4.attention.query_key_value": 2, "embedding.word": 1}),
    ]:
        model = model_with(mode)
        calls = Calls(model)
        run(model)[0].backward()
        assert {name: calls.counts[name] for name in again} == again, mode


def test_full_keeps_one_activation_a_block() -> None:
    plain = run(model_with({}))[1]
    full = run(model_with({"activation_checkpointing": "full"}))[1]
    part = run(model_with({"activation_checkpointing": "every_nth"}))[1]
    attention = run(model_with({"activation_checkpointing": "attention"}))[1]
    assert full < part < plain and full < attention < plain


def test_a_budget_keeps_its_share_of_the_products() -> None:
    from megatrain.models.recompute import _ProductRecorder

    model = model_with({})
    block = model.layers["0"]  # type: ignore[index]
    x = torch.randn(16, 2, 32, requires_grad=True)
    with _ProductRecorder() as recorder:
        block(x, MicroBatch(torch.tensor([1, 2])))
    sizes = {which: size for _, size, which in recorder._products}
    assert len(sizes) == 7, "query_key_value, scores, mixture, output, gate, up, down"
    for budget in (0.0, 0.3, 0.6, 1.0):
        kept = sum(sizes[which] for which in recorder.worth_keeping(budget))
        assert kept <= budget * sum(sizes.values())
    assert recorder.worth_keeping(1.0) == set(sizes) and not recorder.worth_keeping(0.0)


# of a block, whose 256 tokens have a width of 32, heads of 8 (queries 4, keys and values 2) in sequences of 16, and
# 64 in between: operations, 2 × rows × inputs × outputs, and bytes of the result, by the product's name
PRODUCTS = {
    "query_key_value": (2 * 256 * 32 * 64, 4 * 256 * 64),
    "scores": (2 * 16 * 4 * 16 * 8 * 16, 4 * 16 * 4 * 16 * 16),
    "mixture": (2 * 16 * 4 * 16 * 16 * 8, 4 * 16 * 4 * 16 * 8),
    "output": (2 * 256 * 32 * 32, 4 * 256 * 32),
    "gate": (2 * 256 * 32 * 64, 4 * 256 * 64),
    "up": (2 * 256 * 32 * 64, 4 * 256 * 64),
    "down": (2 * 256 * 64 * 32, 4 * 256 * 32),
}


@pytest.mark.parametrize(
    ("budget", "kept"),
    [
        (0.0, set()),
        (0.1, {"down"}),  # 32 operations a byte, where the others of weights have 16 and attention 4 and 8
        (0.4, {"down", "query_key_value", "output"}),  # 36 %, and none of the others fits into the rest
        (0.9, PRODUCTS.keys() - {"scores"}),
        (1.0, PRODUCTS.keys()),
    ],
)
def test_a_budget_keeps_the_most_operations_for_its_bytes(budget: float, kept: set[str]) -> None:
    """By torch's own counter: what is not kept is computed once more in each of five blocks."""

    def operations(mode: dict[str, Any]) -> int:
        model = model_with(mode)
        run(model)[0].backward()  # decides what is kept
        with FlopCounterMode(display=False) as counter:
            run(model)[0].backward()
        return counter.get_total_flops()

    assert sum(PRODUCTS[name][1] for name in kept) <= budget * sum(size for _, size in PRODUCTS.values())
    again = operations({"activation_checkpointing": "budget", "activation_budget": budget}) - operations({})
    assert again == 5 * sum(count for name, (count, _) in PRODUCTS.items() if name not in kept)


def test_a_budget_meets_experts_without_rows() -> None:
    # a width for which experts are multiplied one by one
    model = {"experts.num_experts": 8, "experts.per_token": 1, "router.normalize": False, "experts.hidden_size": 3}
    model["router.balance_loss"] = 0.0
    train = {"activation_checkpointing": "budget", "activation_budget": 0.5}
    config = run_config("llama", ONE_PROCESS, model=model, train=train)
    net = build_model(config.model, config.train.seed)
    apply_recompute(net, config.train)
    tokens = global_batch(1).tokens[:1, :4]  # four rows for eight experts
    net(tokens, tokens, dropout_keys(0, torch.zeros(1, dtype=torch.int64))).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


def test_offloaded_tensors_go_to_the_host_and_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[Tensor] = []
    copy = torch.Tensor.copy_

    def spy(self: Tensor, source: Tensor, *args: Any) -> Tensor:
        packed.append(source)
        return copy(self, source, *args)

    model = model_with({"offload_activations": True})
    monkeypatch.setattr(torch.Tensor, "copy_", spy)
    loss, _ = run(model)
    monkeypatch.undo()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert len(packed) > 5 * 8, "every block keeps more than that"
    assert not any(tensor.untyped_storage().data_ptr() in weights for tensor in packed)
    loss.backward()
