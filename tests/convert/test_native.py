"""This project's own checkpoints as a source of conversions."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatrain.convert.errors import ConversionError
from megatrain.convert.native import NativeReader, NativeWriter
from megatrain.models.build import build_model
from megatrain.spec.derive import resolve_model
from megatrain.spec.kinds import WEIGHT
from megatrain.spec.schema import ModelConfig

BIAS = "layers.0.feed_forward.router.balance_bias"
SIZES: dict[str, Any] = {"num_layers": 1, "hidden_size": 8, "num_heads": 2, "vocab_size": 16, "num_experts": 2}


def test_balance_biases_are_not_lost_where_their_rate_is_zero(tmp_path: Path) -> None:
    for step, rate in enumerate((0.01, 0.0), 1):
        model = resolve_model(ModelConfig.model_validate({**SIZES, "router_balance_rate": rate}))
        writer = NativeWriter(tmp_path, model, step)
        writer.begin({})
        for name, weight in [*build_model(model, seed=1).named_parameters(), (BIAS, torch.tensor([0.5, -0.5]))]:
            writer.write(WEIGHT, name, weight.detach())
        writer.finish()
    assert NativeReader(tmp_path / "step-00000001").read(WEIGHT, BIAS).tolist() == [0.5, -0.5]
    with pytest.raises(ConversionError, match="holds balance biases, but its model"):
        NativeReader(tmp_path / "step-00000002")
