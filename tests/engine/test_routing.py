"""The balance biases of a run's routers, from checkpoint to checkpoint."""

from types import SimpleNamespace
from typing import Any

import torch

from megatrain.engine.engine import RankModel
from megatrain.engine.routing import Routers
from megatrain.models.build import build_model
from tests.configs import model_spec

SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 8,
    "attention.num_heads": 2,
    "vocab_size": 16,
    "experts.num_experts": 4,
}


def routers(rate: float) -> tuple[Routers, torch.nn.Module]:
    config = model_spec({**SIZES, "experts.num_dense_layers": 1, "router.balance_rate": rate})
    model = build_model(config, seed=1)
    mesh: Any = SimpleNamespace(device=torch.device("cpu"))
    return Routers(config, RankModel([model]), mesh), model.layers["1"].feed_forward.router


def test_biases_outlive_their_rate() -> None:
    """DeepSeek-AI 2024 (V3), section 4.2: for the last tokens the rate is zero, and the biases stay as they are."""
    saved = {"layers.1.feed_forward.router.balance_bias": [0.0, 0.5, -0.25, 2.0]}
    for rate in (0.01, 0.0):
        resumed, router = routers(rate)
        resumed.load_biases(saved)
        assert resumed.saved_biases() == saved
        assert (router(torch.zeros(3, 1, 8)).experts.sort(-1).values == torch.tensor([1, 3])).all()


def test_without_a_rate_there_is_no_bias() -> None:
    fresh, router = routers(0.0)
    fresh.load_biases({})
    assert fresh.saved_biases() == {} and router.state.bias_E is None
    assert routers(0.01)[0].saved_biases() == {"layers.1.feed_forward.router.balance_bias": [0.0] * 4}
