"""This project's own checkpoints as a source of conversions."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatrain.checkpoint.store.arrays import CheckpointReader
from megatrain.convert.errors import ConversionError
from megatrain.convert.native import NativeReader, NativeWriter, _adam_settings
from megatrain.convert.table import Weights
from megatrain.models.build import build_model
from megatrain.spec.kinds import WEIGHT
from tests.configs import model_spec

BIAS = "layers.0.feed_forward.router.balance_bias"
KINDS = ("weight", "exp_avg", "exp_avg_sq")
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


def test_what_was_written_is_read(tmp_path: Path) -> None:
    """Each kind for itself, however they are asked for; and the number of updates."""
    model = model_spec(SIZES)
    written = {
        (kind, name): weight.detach() + number
        for number, kind in enumerate(KINDS)
        for name, weight in build_model(model, seed=1).named_parameters()
    }
    writer = NativeWriter(tmp_path, model, 7)
    writer.begin({})
    for (kind, name), tensor in written.items():
        writer.write(kind, name, tensor)
    writer.finish()
    reader = NativeReader(tmp_path / "step-00000007")
    assert reader.step == CheckpointReader(reader.path).state["optimizer_steps"] == 7
    assert reader.kinds == KINDS
    weights = Weights(reader)
    for kind, name in sorted(written, key=lambda key: key[1]):
        assert torch.equal(weights.read(kind, name), written[kind, name]), (kind, name)


def test_the_settings_of_adamw_go_along() -> None:
    optimizer = {"name": "adamw", "lr": 0.1, "beta1": 0.8, "beta2": 0.7, "eps": 1e-6, "weight_decay": 0.2}
    expected = {"lr": 0.1, "betas": (0.8, 0.7), "eps": 1e-6, "weight_decay": 0.2}
    assert _adam_settings({"config": {"optimizer": optimizer}}) == expected
    assert _adam_settings({"config": {"optimizer": {**optimizer, "name": "lion"}}}) == {}
