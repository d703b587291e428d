"""What a logging step covers, added up by hand."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatrain.config.derive import resolve
from megatrain.data.feed.rows import Batch
from megatrain.record.meter import Meter
from megatrain.record.throughput import Hardware
from megatrain.spec.counts import flops_per_token
from megatrain.spec.labels import IGNORE
from tests.configs import run_config_of

MODEL = {"num_layers": 1, "hidden_size": 16, "attention.num_heads": 2, "vocab_size": 8}
CONFIG = resolve(run_config_of({"model": MODEL, "train": {"steps": 100}}), 1)


def meter_at(step: int) -> Meter:
    """Of one process, whose data have two sources of 50 samples, read in turn, four tokens each."""
    mesh = SimpleNamespace(device=torch.device("cpu"), coordinate=lambda axis: 0)
    engine: Any = SimpleNamespace(mesh=mesh, over_all_ranks=lambda tensor: tensor)
    data: Any = SimpleNamespace(
        names=["a", "b"],
        blend=SimpleNamespace(counts=lambda samples: [samples // 2, samples // 2]),
        steps=SimpleNamespace(first_sample=lambda step: 2 * step, window=4),
        samples=dict.fromkeys("ab", SimpleNamespace(num_samples=50)),
    )
    return Meter(CONFIG, engine, data, Hardware(2, 1e6), step)


def step_of(loss: float, skipped: bool = False) -> tuple[Batch, Any]:
    """Two sequences of four tokens; the second one's last has no loss."""
    labels = torch.ones(2, 4, dtype=torch.int64)
    labels[1, 3] = IGNORE
    batch = Batch(torch.ones(2, 4, dtype=torch.int64), labels, torch.arange(2), None, torch.tensor([0, 1]))
    losses = torch.tensor([4 * loss, 3 * loss])
    result = SimpleNamespace(
        loss=torch.tensor(loss), losses=losses, grad_norm=torch.tensor(2.0), lr=0.5, tokens=8, loss_scale=1.0,
        skipped=skipped, routing=None,
    )  # fmt: skip
    return batch, result


def test_a_record_covers_the_steps_since_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    meter = meter_at(40)
    for loss, skipped in ((3.0, True), (2.0, False), (1.0, False)):
        batch, result = step_of(loss, skipped)
        meter.add(batch, result)
    meter.leave_out(6.0)
    clock[0] = 110.0
    record, sources = meter.read(43, result)
    flops = 3 * 8 * flops_per_token(CONFIG.model, 4)
    assert (record.num_steps, record.steps_left, record.num_skipped, record.tokens) == (3, 57, 1, 24)
    assert (record.seconds, record.tokens_per_second, record.flops) == (4.0, 6.0, flops)
    assert record.mfu == pytest.approx(flops / 4.0 / 2e6)
    assert (record.loss, record.grad_norm, record.skipped) == (1.0, 2.0, False)
    assert "| eta 0:01:16 | 1 steps skipped" in record.line(), "4 / 3 seconds for each of 57 steps"
    assert {name: (counts.tokens, counts.epoch, counts.loss) for name, counts in sources.sources.items()} == {
        "a": (43 * 4, 0.86, 2.0), "b": (43 * 4, 0.86, 2.0),
    }  # fmt: skip

    meter.add(*step_of(5.0))
    clock[0] = 112.0
    record, sources = meter.read(44, step_of(5.0)[1])
    assert (record.num_steps, record.num_skipped, record.tokens, record.seconds) == (1, 0, 8, 2.0)
    assert [counts.loss for counts in sources.sources.values()] == [5.0, 5.0]
