"""Any layout, same checkpoint: saved in one layout, resumed in another, the run goes on as if never stopped."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatrain.checkpoint.store.arrays import CheckpointReader
from megatrain.checkpoint.store.errors import UnfitError
from megatrain.checkpoint.store.folder import newest_checkpoint
from tests.layouts import Layout, Trained, build_engine, global_batch, run_config, train_steps
from tests.pool import Pool

LAYOUTS = [
    Layout(),
    Layout(dp=2, zero_stage=3),
    Layout(tp=2, sequence_parallel=True, zero_stage=1),
    Layout(tp=2, dp=2, zero_stage=2),
    Layout(pp=2, zero_stage=1, schedule="interleaved_1f1b"),
]
MORE_LAYOUTS = [
    Layout(pp=2, dp=2, zero_stage=1),
    Layout(tp=2, pp=2, zero_stage=0),
    Layout(dp=4, zero_stage=1),
    Layout(dp=4, zero_stage=3),
    Layout(dp=2, zero_stage=0),
    Layout(tp=4, sequence_parallel=True, zero_stage=0),
    Layout(tp=2, pp=2, dp=2, zero_stage=1),
    Layout(tp=2, dp=2, zero_stage=3),
    Layout(pp=2, dp=2, zero_stage=0, schedule="zbv"),
]
# 4 heads of keys: tensor ranks up to 4 split them; 17 positions: two ranks of ZeRO 3 share a row of them
MODEL = {
    "dropout": 0.1,
    "attention.dropout": 0.1,
    "num_layers": 4,
    "attention.num_heads": 8,
    "attention.num_kv_heads": 4,
    "max_seq_len": 17,
}


def engine_of(family: str, layout: Layout, dtype: str = "fp32") -> Any:
    """Two micro-batches a step, four where a pipeline needs them: what more of them cost, no checkpoint sees."""
    micro_batch_size = 16 // layout.dp // (2 if layout.pp == 1 else 4)
    train = {"global_batch_size": 16, "micro_batch_size": micro_batch_size}
    return build_engine(run_config(family, layout, model=MODEL, train=train, precision={"dtype": dtype}))


def next_steps(engine: Any) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of two steps: the first tells of the weights, the second of the moments too."""
    rank, size = engine.mesh.coordinate("dp"), engine.mesh.topology.dp
    results = [engine.train_step(global_batch(step, rank, size), step) for step in (4, 5)]
    return [float(result.loss) for result in results], [float(result.grad_norm) for result in results]


@dataclass
class Saved:
    """What a run did after its checkpoint ``path``."""

    path: str
    losses: list[float]
    grad_norms: list[float]


def train_and_save(family: str, layout: Layout, folder: str) -> Saved:
    """Three steps, a checkpoint of several chunks a tensor, as large models have them, and two steps more."""
    from megatrain.checkpoint import shares
    from megatrain.checkpoint.save import save_checkpoint

    engine = engine_of(family, layout)
    limits = shares.MIN_CHUNK_ELEMENTS, shares.CHUNKS_PER_RANK
    shares.MIN_CHUNK_ELEMENTS, shares.CHUNKS_PER_RANK = 1024, 1000
    try:
        train_steps(engine, 1, 3)
        path = save_checkpoint(engine, Path(folder), 3, "test", {})
        return Saved(str(path), *next_steps(engine))
    finally:
        shares.MIN_CHUNK_ELEMENTS, shares.CHUNKS_PER_RANK = limits
        engine.close()


def load_each(family: str, layout: Layout, paths: list[str], folder: str) -> list[Saved]:
    """Loads one after the other into the same engine; saves it again at once, to be compared, and trains on."""
    from megatrain.checkpoint.load import load_checkpoint
    from megatrain.checkpoint.save import save_checkpoint

    engine = engine_of(family, layout)
    results = []
    try:
        for number, path in enumerate(paths):
            assert load_checkpoint(engine, Path(path), lambda data, step: None)["step"] == 3
            again = save_checkpoint(engine, Path(folder) / str(number), 3, "again", {})
            results.append(Saved(str(again), *next_steps(engine)))
    finally:
        engine.close()
    return results


def require_equal_arrays(first: str, second: str) -> None:
    """Every weight and moment, put together from its chunks, bit for bit."""
    one, two = CheckpointReader(Path(first)), CheckpointReader(Path(second))
    assert one.arrays.keys() == two.arrays.keys()
    assert one.state["optimizer_steps"] == two.state["optimizer_steps"] == 3
    for key in one.arrays:
        assert one.read(*key).tobytes() == two.read(*key).tobytes(), f"{key} is not bit-equal"


def every_pair(pool: Pool, folder: Path, family: str, layouts: list[Layout]) -> None:
    uninterrupted = [
        pool.run(train_and_save, layout.world_size, family, layout, str(folder / str(layout)))[0] for layout in layouts
    ]
    paths = [saved.path for saved in uninterrupted]
    assert any(spec.grid[0] > 1 for spec in CheckpointReader(Path(paths[0])).arrays.values() if spec.grid)
    for layout in layouts:
        place = folder / f"to-{layout}"
        for saved_in, before, after in zip(
            layouts,
            uninterrupted,
            pool.run(load_each, layout.world_size, family, layout, paths, str(place))[0],
            strict=True,
        ):
            require_equal_arrays(before.path, after.path)
            if saved_in == layout:
                assert after.losses == before.losses, "the same layout is bit-exact, dropout on"
                assert after.grad_norms == before.grad_norms
            # FP32: other layouts add in another order; the bands of test_layouts
            assert after.losses == pytest.approx(before.losses, rel=1e-5), f"{saved_in} to {layout}"
            assert after.grad_norms == pytest.approx(before.grad_norms, rel=2e-5), f"{saved_in} to {layout}"


@pytest.mark.timeout(600)
def test_resume_between_every_pair_of_layouts(pool: Pool, memory_path: Path) -> None:
    every_pair(pool, memory_path, "gpt", LAYOUTS)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_resume_between_every_pair_of_many_layouts(pool: Pool, memory_path: Path, family: str) -> None:
    every_pair(pool, memory_path, family, LAYOUTS + MORE_LAYOUTS)


def train_save_and_go_on(layout: Layout, folder: str, dtype: str) -> Trained:
    from megatrain.checkpoint.save import save_checkpoint

    engine = engine_of("llama", layout, dtype)
    try:
        if dtype == "fp16":  # a scale that a new engine would not have
            engine.load_loss_scaler_state({**engine.loss_scaler_state(), "cur_scale": 64.0})
        train_steps(engine, 1, 3)
        save_checkpoint(engine, Path(folder), 3, "test", {})
        return train_steps(engine, 4, 6)
    finally:
        engine.close()


def resume_and_go_on(layout: Layout, folder: str, dtype: str) -> Trained:
    from megatrain.checkpoint.load import load_checkpoint

    engine = engine_of("llama", layout, dtype)
    try:
        path = newest_checkpoint(Path(folder))
        assert path is not None
        load_checkpoint(engine, path, lambda data, step: None)
        return train_steps(engine, 4, 6)
    finally:
        engine.close()


def sixteen_bit_cases() -> list:
    """All behind the marker; by default each ZeRO stage and both types once."""
    pipelines, both_axes = MORE_LAYOUTS[:2]
    quick = {("bf16", LAYOUTS[1]), ("bf16", pipelines), ("fp16", both_axes), ("fp16", LAYOUTS[3])}
    return [
        pytest.param(dtype, layout, id=f"{dtype}-{layout}", marks=() if (dtype, layout) in quick else pytest.mark.slow)
        for dtype in ("bf16", "fp16")
        for layout in [*LAYOUTS, pipelines, both_axes]
    ]


@pytest.mark.parametrize(("dtype", "layout"), sixteen_bit_cases())
def test_16_bit_resume_is_bit_exact(pool: Pool, memory_path: Path, dtype: str, layout: Layout) -> None:
    uninterrupted = pool.run(train_save_and_go_on, layout.world_size, layout, str(memory_path), dtype)
    resumed = pool.run(resume_and_go_on, layout.world_size, layout, str(memory_path), dtype)
    assert resumed[0].losses == uninterrupted[0].losses
    assert resumed[0].loss_scales == uninterrupted[0].loss_scales
    for key, (part, *_) in resumed[0].state.items():
        assert np.array_equal(part, uninterrupted[0].state[key][0]), f"{key} is not bit-equal"


def load_other_model(folder: str) -> str:
    from megatrain.checkpoint.load import load_checkpoint

    engine = build_engine(run_config("llama", Layout(), model={"hidden_size": 64, "rope.theta": 5e5}))
    with pytest.raises(UnfitError) as error:
        load_checkpoint(engine, Path(folder) / "step-00000003", lambda data, step: None)
    return str(error.value)


def test_checkpoint_of_another_model_is_refused(pool: Pool, memory_path: Path) -> None:
    pool.run(train_and_save, 1, "gpt", Layout(), str(memory_path))
    message = pool.run(load_other_model, 1, str(memory_path))[0]
    for field in (
        "model.family: 'gpt' saved, 'llama' asked",
        "model.hidden_size",
        "model.rope.theta",
        "model.tie_embeddings",
    ):
        assert field in message
