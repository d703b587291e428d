"""FP16: which steps the loss scale skips, and that a skipped step moves nothing but the scale and the schedule."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.factory import make_dataset
from tests.layouts import Layout, build_engine, global_batch, run_config
from tests.reference.comparison import Bands, differences
from tests.reference.conftest import Run
from tests.reference.files import read_metrics
from tests.reference.runs import VOCAB, sections_of
from tests.reference.scaler import LossScaler

# FP16 rounds each activation, weight and gradient by 2^-12 = 2.4e-4, and the reference none: an element of a gradient
# comes through some tens of them, a norm averages them out. Measured: 5e-6, 2e-4, 6e-3 and 9e-3.
BANDS = Bands(loss=2e-5, norm=1e-3, update=2e-2, moment=3e-2)
GPT = {"family": "gpt", "dropout": 0.1, "init_std": 0.05}
# initial weights with which no token is so near to another expert that FP16 sends it there
MIXTURE = {
    "family": "llama",
    "init_std": 0.11,
    "experts.num_dense_layers": 1,
    "experts.num_experts": 4,
    "experts.hidden_size": 16,
}
MIXTURE |= {"router.balance_loss": 0.0, "router.z_loss": 0.3, "router.balance_rate": 0.05}


@pytest.mark.parametrize(
    ("model", "precision", "skipped", "stop"),
    [
        (
            GPT,
            {"initial_loss_scale": 2.0**21, "loss_scale_window": 2},
            [True, True, False, False, False, True, False],
            5,
        ),
        (MIXTURE, {"initial_loss_scale": 2.0**20, "loss_scale_hysteresis": 2}, [True, True, True, False, False], 2),
    ],
    ids=["window", "hysteresis of a mixture"],
)
def test_skipped_steps(
    train: Run, tmp_path: Path, model: dict[str, Any], precision: dict[str, Any], skipped: list[bool], stop: int
) -> None:
    corpus = str(make_dataset(tmp_path / "data", 3000, VOCAB))
    sections = {
        "model": model,
        "precision": {"dtype": "fp16", **precision},
        "optimizer": {"eps": 1e-2, "grad_clip": 0.5},
        "schedule": {"warmup_steps": 2, "decay_steps": 6},
        "train": {"steps": len(skipped), "micro_batch_size": 8, "eval_batches": 1},
    }
    run = train(sections_of(sections, dict.fromkeys(("large", "held_out"), corpus)), stop)
    assert [record["skipped"] for record in read_metrics(run) if record["kind"] == "step"] == skipped
    problems, _ = differences(run, BANDS)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(("window", "hysteresis"), [(1, 1), (3, 2), (2, 3)])
def test_scale_over_a_long_pattern_of_overflows(world: None, window: int, hysteresis: int) -> None:
    """Steps whose gradients are made infinite, or left as they are, at random."""
    precision = {"dtype": "fp16", "loss_scale_window": window, "loss_scale_hysteresis": hysteresis}
    precision |= {"initial_loss_scale": 2.0**10}
    train, model = (
        {"steps": 100, "micro_batch_size": 16},
        {"num_layers": 1, "hidden_size": 8, "feed_forward.hidden_size": 8},
    )
    config = run_config("llama", Layout(), model=model, precision=precision, train=train)
    random, scaler = np.random.default_rng(window), LossScaler(config.precision.model_dump())
    engine = build_engine(config)
    try:
        broken = False
        engine.parameters[0][1].register_hook(lambda gradient: gradient * float("inf") if broken else gradient)
        for step in range(1, 41):
            # near FP16's ends the pattern is not left to chance: no overflow by itself, none at the smallest scale
            broken = scaler.scale > 2**12 or (scaler.scale > 2 and bool(random.random() < 0.5))
            result = engine.train_step(global_batch(1), step)
            assert (result.loss_scale, result.skipped) == (scaler.scale, broken), f"step {step}"
            scaler.step(broken)
    finally:
        engine.close()
