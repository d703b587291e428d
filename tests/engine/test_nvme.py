"""Weights, master weights and moments on a disk: the same numbers."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.layouts import ONE_PROCESS, Layout, Trained, build_engine, run_config, train_steps, worst_state_error
from tests.parallel.test_layouts import LOSS, NORM
from tests.pool import Pool

# DeepSpeed swaps no piece below 1 MiB
MODEL = {"num_layers": 2, "hidden_size": 512, "feed_forward.hidden_size": 2048}


def train_on(layout: Layout, disk: Path | None, **sections: dict[str, str]) -> tuple[Trained, int]:
    """Three steps, and the bytes that lie on the disk then."""
    engine = build_engine(run_config("llama", layout, model=MODEL, **sections))
    try:
        trained = train_steps(engine, 1, 3)
        return trained, sum(file.stat().st_size for file in disk.rglob("*") if file.is_file()) if disk else 0
    finally:
        engine.close()


@pytest.fixture
def disk(operator: Callable[[str], None], tmp_path: Path) -> Path:
    operator("AsyncIOBuilder")
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(900)  # the operator is compiled once
def test_optimizer_state_on_a_disk_changes_no_number(pool: Pool, disk: Path) -> None:
    reference, _ = pool.run(train_on, 1, ONE_PROCESS, None)[0]
    offload = {"optimizer": "nvme", "nvme_path": str(disk)}
    ranks = pool.run(train_on, 2, Layout(dp=2, zero_stage=3), disk, offload=offload)
    for trained, _ in ranks:
        assert trained.losses == pytest.approx(reference.losses, rel=LOSS)
        assert trained.grad_norms == pytest.approx(reference.grad_norms, rel=NORM)
    error, where = worst_state_error([trained for trained, _ in ranks], reference)
    assert error < 5e-3, f"{where} differs by {error:.1e}"  # AdamW, as in test_optimizers
    weights = sum(part.size for (kind, _), (part, _) in reference.state.items() if kind == "weight")
    assert ranks[0][1] > 0.9 * 3 * 4 * weights, "master weights and both moments lie on the disk"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_weights_on_a_disk_change_no_bit(pool: Pool, disk: Path, dtype: str) -> None:
    layout, precision = Layout(dp=2, zero_stage=3), {"dtype": dtype}
    reference, _ = pool.run(train_on, 2, layout, None, precision=precision)[0]
    offload = {"parameters": "nvme", "nvme_path": str(disk)}
    trained, bytes_on_disk = pool.run(train_on, 2, layout, disk, precision=precision, offload=offload)[0]
    assert (trained.losses, trained.grad_norms) == (reference.losses, reference.grad_norms)
    assert bytes_on_disk > 0
