"""Experts and balance biases survive a change of layout: saved with one expert axis, resumed with another."""

from pathlib import Path

import numpy as np
import pytest

from tests.layouts import Layout, Trained, build_engine, run_config, train_steps
from tests.parallel.test_layouts import LOSS, NORM
from tests.parallel.test_mixture import MODELS, OPTIMIZER
from tests.pool import Pool

LAYOUTS = [
    Layout(),
    Layout(dp=2, ep=2, zero_stage=2),
    Layout(2, 1, 2, True, 1, ep=2),
    Layout(pp=2, cp=2, ep=2, zero_stage=0),
    Layout(dp=4, ep=4, zero_stage=1),
]


def train_and_save(layout: Layout, folder: str) -> Trained:
    """Three steps, a checkpoint, three more."""
    from megatrain.checkpoint.save import save_checkpoint

    engine = build_engine(run_config("gpt", layout, model=MODELS["gpt"], optimizer=OPTIMIZER))
    train_steps(engine, 1, 3)
    save_checkpoint(engine, Path(folder), 3, "test", {})
    return train_steps(engine, 4, 6)


def resume_and_train(layout: Layout, folder: str) -> tuple[Trained, list[list[float]]]:
    from megatrain.checkpoint.load import load_checkpoint

    engine = build_engine(run_config("gpt", layout, model=MODELS["gpt"], optimizer=OPTIMIZER))
    load_checkpoint(engine, Path(folder) / "step-00000003", lambda data, step: None)
    biases = engine.routers.biases.tolist()
    return train_steps(engine, 4, 6), biases


def biases_of_generation(folder: str) -> list[list[float]]:
    from megatrain.inference.generate import load_model
    from megatrain.models.parts.mixture import Router

    model = load_model(Path(folder) / "step-00000003")
    return [m.state.bias_E.tolist() for m in model.modules() if isinstance(m, Router)]


@pytest.mark.parametrize(
    "saved", [pytest.param(layout, id=str(layout), marks=() if i == 2 else pytest.mark.slow)
              for i, layout in enumerate(LAYOUTS)]
)  # fmt: skip
def test_resume_with_another_expert_axis(pool: Pool, tmp_path: Path, saved: Layout) -> None:
    folder = str(tmp_path)
    uninterrupted = pool.run(train_and_save, saved.world_size, saved, folder)
    expected_biases = biases_of_generation(folder)
    assert any(bias for row in expected_biases for bias in row), "three steps have moved the biases"
    for layout in LAYOUTS:
        results = pool.run(resume_and_train, layout.world_size, layout, folder)
        for resumed, biases in results:
            assert biases == expected_biases
            assert resumed.losses == pytest.approx(uninterrupted[0].losses, rel=LOSS)
            assert resumed.grad_norms == pytest.approx(uninterrupted[0].grad_norms, rel=NORM)
        if layout == saved:
            for (resumed, _), before in zip(results, uninterrupted, strict=True):
                assert resumed.losses == before.losses, "the same layout is bit-exact"
                assert all(np.array_equal(resumed.state[key][0], before.state[key][0]) for key in before.state)
