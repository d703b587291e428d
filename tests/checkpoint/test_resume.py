"""Any layout, same checkpoint: saved in one layout, resumed in another, the run goes on as if never stopped."""

from pathlib import Path

import numpy as np
import pytest

from megatrain.checkpoint.errors import CheckpointError
from tests.layouts import Layout, Trained, build_engine, run_config, train_steps
from tests.pool import Pool

LAYOUTS = [
    Layout(),
    Layout(dp=2, zero_stage=3),
    Layout(tp=2, sequence_parallel=True, zero_stage=1),
    Layout(pp=2, dp=2, zero_stage=1),
    Layout(tp=2, pp=2, zero_stage=0),
    Layout(tp=2, dp=2, zero_stage=2),
    Layout(pp=2, stages_per_rank=2, zero_stage=1),
]
DROPOUT = {"dropout": 0.1, "attention_dropout": 0.1}


def train_and_save(family: str, layout: Layout, folder: str, dtype: str) -> Trained:
    """Three steps, a checkpoint, three more."""
    from megatrain.checkpoint.save import save_checkpoint

    engine = build_engine(run_config(family, layout, model=DROPOUT, precision={"dtype": dtype}))
    train_steps(engine, 1, 3)
    save_checkpoint(engine, Path(folder), 3, "test", {})
    return train_steps(engine, 4, 6)


def resume_and_train(family: str, layout: Layout, folder: str, dtype: str) -> Trained:
    from megatrain.checkpoint.folder import newest_checkpoint
    from megatrain.checkpoint.save import load_checkpoint

    engine = build_engine(run_config(family, layout, model=DROPOUT, precision={"dtype": dtype}))
    path = newest_checkpoint(Path(folder))
    assert path is not None
    assert load_checkpoint(engine, path, {})["step"] == 3
    return train_steps(engine, 4, 6)


def load_other_model(folder: str) -> str:
    from megatrain.checkpoint.save import load_checkpoint

    engine = build_engine(run_config("llama", Layout(), model={"hidden_size": 64, "rope_theta": 5e5}))
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(engine, Path(folder) / "step-00000003", {})
    return str(error.value)


def saved_layouts() -> list:
    """Every pair of layouts behind the marker; by default one that mixes axes, into all."""
    quick = Layout(tp=2, pp=2, zero_stage=0)
    return [
        pytest.param(
            family, saved, id=f"{family}-{saved}", marks=() if (family, saved) == ("llama", quick) else pytest.mark.slow
        )
        for family in ("gpt", "llama")
        for saved in LAYOUTS
    ]


@pytest.mark.timeout(1200)  # eight runs, several of four ranks
@pytest.mark.parametrize(("family", "saved"), saved_layouts())
def test_resume_in_every_layout(pool: Pool, tmp_path: Path, family: str, saved: Layout) -> None:
    folder = str(tmp_path)
    uninterrupted = pool.run(train_and_save, saved.world_size, family, saved, folder, "fp32")
    for layout in LAYOUTS:
        resumed = pool.run(resume_and_train, layout.world_size, family, layout, folder, "fp32")
        if layout == saved:
            assert resumed[0].losses == uninterrupted[0].losses, "the same layout is bit-exact, dropout on"
            assert resumed[0].grad_norms == uninterrupted[0].grad_norms
            for (key, (part, *_)), (_, (expected, *_)) in zip(
                resumed[0].state.items(), uninterrupted[0].state.items(), strict=True
            ):
                assert np.array_equal(part, expected), f"{key} is not bit-equal"
        # FP32: other layouts add in another order; the bands of test_layouts
        assert resumed[0].losses == pytest.approx(uninterrupted[0].losses, rel=1e-5)
        assert resumed[0].grad_norms == pytest.approx(uninterrupted[0].grad_norms, rel=2e-5)


def sixteen_bit_cases() -> list:
    """All behind the marker; by default each ZeRO stage and both types once."""
    quick = {("bf16", LAYOUTS[1]), ("bf16", LAYOUTS[3]), ("fp16", LAYOUTS[4]), ("fp16", LAYOUTS[5])}
    return [
        pytest.param(dtype, layout, id=f"{dtype}-{layout}", marks=() if (dtype, layout) in quick else pytest.mark.slow)
        for dtype in ("bf16", "fp16")
        for layout in LAYOUTS
    ]


@pytest.mark.parametrize(("dtype", "layout"), sixteen_bit_cases())
def test_16_bit_resume_is_bit_exact(pool: Pool, tmp_path: Path, dtype: str, layout: Layout) -> None:
    uninterrupted = pool.run(train_and_save, layout.world_size, "llama", layout, str(tmp_path), dtype)
    resumed = pool.run(resume_and_train, layout.world_size, "llama", layout, str(tmp_path), dtype)
    assert resumed[0].losses == uninterrupted[0].losses
    assert resumed[0].loss_scales == uninterrupted[0].loss_scales
    for key, (part, *_) in resumed[0].state.items():
        assert np.array_equal(part, uninterrupted[0].state[key][0]), f"{key} is not bit-equal"


def test_checkpoint_of_another_model_is_refused(pool: Pool, tmp_path: Path) -> None:
    pool.run(train_and_save, 1, "gpt", Layout(), str(tmp_path), "fp32")
    message = pool.run(load_other_model, 1, str(tmp_path))[0]
    for field in (
        "model.family: 'gpt' saved, 'llama' asked",
        "model.hidden_size",
        "model.rope_theta",
        "model.tie_embeddings",
    ):
        assert field in message
