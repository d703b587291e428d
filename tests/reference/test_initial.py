"""What weights begin with: as the reference draws them, and so distributed as the papers say."""

import math
from typing import Any

import pytest
import torch

from megatrain.models.build import build_model
from tests.configs import model_spec
from tests.reference.files import dotted
from tests.reference.initial import initial_weights
from tests.reference.runs import SIGMOID, SOFTMAX

SIZES = {
    "num_layers": 4,
    "hidden_size": 32,
    "attention.num_heads": 4,
    "attention.num_kv_heads": 2,
    "vocab_size": 96,
    "max_seq_len": 32,
}


@pytest.mark.parametrize(
    "model",
    [
        {"family": "gpt", **SIGMOID, "experts.interval": 2},
        {"family": "gpt", "tie_embeddings": False, "attention.bias": False},
        {"family": "llama", **SOFTMAX, "experts.num_dense_layers": 1, "experts.interval": 2},
        {"family": "llama", "tie_embeddings": True, "attention.bias": True, "attention.head_width": 12},
        {"family": "qwen3", **SOFTMAX, "experts.num_shared": 0, "experts.num_dense_layers": 3, "init_std": 0.5},
    ],
    ids=str,
)
def test_weights_of_a_seed(model: dict[str, Any]) -> None:
    config = model_spec({**SIZES, **model})
    for seed in (0, 11):
        ours = {name: weight.double() for name, weight in build_model(config, seed).named_parameters()}
        expected = initial_weights(dotted(config.model_dump()), seed)
        assert sorted(ours) == sorted(expected)
        for name, weight in ours.items():
            assert torch.equal(weight, expected[name]), name


def test_weights_are_normal_and_branches_end_smaller() -> None:
    """Radford et al. 2019, section 2.3. Each matrix' mean, deviation and fourth moment within five standard errors."""
    model = {"num_layers": 2, "hidden_size": 128, "attention.num_heads": 4, "vocab_size": 256, "init_std": 0.3}
    own = {"experts.num_experts": 4, "experts.interval": 2, "experts.num_shared": 1, "experts.hidden_size": 64}
    config = model_spec({"family": "gpt", **model, **own})
    weights = dict(build_model(config, 3).named_parameters())
    matrices = {name: weight.detach().double().flatten() for name, weight in weights.items() if weight.dim() > 1}
    for name, values in matrices.items():
        branch_end = "output" in name or "down" in name
        z = values / (0.3 / math.sqrt(4) if branch_end else 0.3)  # 2 blocks, 2 branches each
        error = 5 / math.sqrt(len(z))
        moments = float(z.mean()), float(z.square().mean()), float(z.pow(4).mean())
        # variances of z, z^2 and z^4 are 1, 2 and 96
        bounds = [error, error * math.sqrt(2), error * math.sqrt(96)]
        assert all(abs(m - e) < b for m, e, b in zip(moments, (0, 1, 3), bounds, strict=True)), f"{name}: {moments}"
    for name, weight in weights.items():
        if weight.dim() == 1:
            assert set(weight.tolist()) == ({0.0} if name.endswith("bias") else {1.0}), name
    first, second = (matrices[f"layers.0.feed_forward.{part}.weight"] for part in ("up", "down"))
    correlation = float((first * second).mean() / (first.std() * second.std()))
    assert abs(correlation) < 5 / math.sqrt(len(first)), "each weight is drawn for itself"
