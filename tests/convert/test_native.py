"""This project's own checkpoints as a source of conversions."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatrain.convert.errors import ConversionError
from megatrain.convert.native import NativeReader, NativeWriter
from megatrain.models.build import build_model
from megatrain.spec.kinds import WEIGHT
from tests.configs import model_spec

BIAS = "layers.0.feed_forward.router.balance_bias"
SIZES: dict[str, Any] = {
    "num_layers": 1,
    "hidden_size": 8,
    "attention.num_heads": 2,
    "vocab_size": 16,
    "experts.num_experts": 2,
}


def test_balance_biases_are_not_lost_where_their_rate_is_zero(tmp_path: Path) -> None:
    for step, rate in enumerate((0.01, 0.0), 1):
        model = model_spec({**SIZES, "router.balance_rate": rate})
        writer = NativeWriter(tmp_path, model, step)
        writer.begin({})
        for name, weight in [*build_model(model, seed=1).named_parameters(), (BIAS, torch.tensor([0.5, -0.5]))]:
            writer.write(WEIGHT, name, weight.detach())
        writer.finish()
    assert NativeReader(tmp_path / "step-00000001").read(WEIGHT, BIAS).tolist() == [0.5, -0.5]
    with pytest.raises(ConversionError, match="holds balance biases, but its model"):
        NativeReader(tmp_path / "step-00000002")
