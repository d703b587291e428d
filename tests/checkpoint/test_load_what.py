"""Weights, or weights and optimizer, of another run: loaded into any layout, and into a vocabulary with more rows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatrain.checkpoint.store.arrays import CheckpointReader
from megatrain.checkpoint.store.errors import UnfitError
from tests.layouts import Layout, build_engine, global_batch, run_config, train_steps
from tests.pool import Pool

SAVED_IN = Layout(tp=2, dp=2, zero_stage=1)
LOADED_IN = [Layout(dp=2, zero_stage=3), Layout(tp=2, zero_stage=1), Layout(pp=2, dp=2, zero_stage=1)]
ROWS, MORE_ROWS = 64, 76  # no multiple of the old ones: shares of ranks begin and end inside and behind them
VOCABULARY = ("embedding.word.weight", "head.weight")


def engine_of(layout: Layout, padding: int = 0) -> Any:
    model = {"num_layers": 2, "vocab_size": ROWS + padding, "vocab_padding": padding}
    train = {"global_batch_size": 16, "micro_batch_size": 4, "seed": 7 if padding else 1}
    return build_engine(run_config("llama", layout, model=model, train=train))


def save(engine: Any, folder: Path, step: int) -> str:
    from megatrain.checkpoint.save import save_checkpoint

    return str(save_checkpoint(engine, folder, step, "test", {}))


def step_of(engine: Any, step: int) -> float:
    batch = global_batch(step, engine.mesh.coordinate("dp"), engine.mesh.topology.dp)
    return float(engine.train_step(batch, step).loss)


def train_and_save(layout: Layout, folder: str) -> tuple[str, float, float]:
    """Three steps and a checkpoint; the losses of the next two steps."""
    engine = engine_of(layout)
    try:
        train_steps(engine, 1, 3)
        return save(engine, Path(folder), 3), step_of(engine, 4), step_of(engine, 5)
    finally:
        engine.close()


def load_and_save(layout: Layout, path: str, what: str, folder: str) -> tuple[str, str, float, float]:
    """A fresh engine saved, then what it is after ``path`` was loaded; the losses of its next two steps."""
    from megatrain.checkpoint.load import load_checkpoint

    def refuse(data: dict[str, Any], step: int) -> None:
        raise AssertionError("the data start anew")

    engine = engine_of(layout, MORE_ROWS - ROWS)
    try:
        fresh = save(engine, Path(folder) / "fresh", 0)
        load_checkpoint(engine, Path(path), refuse, what, grow=True)  # type: ignore[arg-type]
        return fresh, save(engine, Path(folder) / "loaded", 0), step_of(engine, 4), step_of(engine, 5)
    finally:
        engine.close()


@pytest.mark.parametrize("what", ["weights", "weights_and_optimizer"])
def test_parts_of_a_checkpoint_go_into_any_layout_and_a_larger_vocabulary(
    pool: Pool, memory_path: Path, what: str
) -> None:
    path, fourth, fifth = pool.run(train_and_save, 4, SAVED_IN, str(memory_path))[0]
    saved = CheckpointReader(Path(path))
    for layout in LOADED_IN:
        folder = str(memory_path / str(layout))
        fresh_path, loaded_path, loss, next_loss = pool.run(
            load_and_save, layout.world_size, layout, path, what, folder
        )[0]
        fresh, loaded = CheckpointReader(Path(fresh_path)), CheckpointReader(Path(loaded_path))
        assert loaded.arrays.keys() >= saved.arrays.keys()
        for kind, name in saved.arrays:
            before, after = saved.read(kind, name), loaded.read(kind, name)
            if kind != "weight" and what == "weights":
                before = np.zeros_like(before)
            assert np.array_equal(after[: len(before)], before), (layout, kind, name)
            if name in VOCABULARY:
                initial = fresh.read(kind, name)[ROWS:]
                assert len(after) == MORE_ROWS and np.array_equal(after[ROWS:], initial), (layout, kind, name)
                assert initial.any() == (kind == "weight")
        assert loaded.state["optimizer_steps"] == (3 if what == "weights_and_optimizer" else 0)
        # rows that stand for no token take no part in the softmax, so they change no loss
        assert loss == pytest.approx(fourth, rel=1e-6)
        same_update = next_loss == pytest.approx(fifth, rel=1e-5)
        assert same_update == (what == "weights_and_optimizer")


def refusal(path: str, model: dict[str, Any], grow: bool) -> str:
    from megatrain.checkpoint.load import load_checkpoint

    base = {"num_layers": 2, "vocab_size": ROWS, **model}
    engine = build_engine(run_config("llama", Layout(), model=base))
    try:
        load_checkpoint(engine, Path(path), lambda data, step: None, "weights", grow)
        return ""
    except UnfitError as error:
        return str(error)
    finally:
        engine.close()


def test_only_what_cannot_be_loaded_is_refused(pool: Pool, memory_path: Path) -> None:
    path, *_ = pool.run(train_and_save, 4, SAVED_IN, str(memory_path))[0]
    (text,) = pool.run(refusal, 1, path, {"vocab_size": ROWS + 1, "rope.theta": 5e5}, False)
    assert "model.vocab_size: 64 saved, 65 asked\n" in text
    assert "model.rope.theta: 10000.0 saved, 500000.0 asked (may change)" in text
    (text,) = pool.run(refusal, 1, path, {"vocab_size": ROWS - 1}, True)
    assert "model.vocab_size: 64 saved, 63 asked\n" in text
    harmless = {"rope.theta": 5e5, "max_seq_len": 32, "norm.eps": 1e-6, "attention.documents": "per_document"}
    assert pool.run(refusal, 1, path, harmless, False) == [""]
