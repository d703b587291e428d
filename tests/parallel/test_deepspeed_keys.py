"""DeepSpeed's own keys at their extremes: the numbers of one process, and a checkpoint for any layout.

Together with every other feature each key is tried by tests/parallel/test_matrix.py, at one value.
"""

import contextlib
import functools
import io
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatrain.config.rules.compatibility import SETTINGS
from megatrain.config.rules.deepspeed_keys import ALLOWED
from tests.config.test_deepspeed_keys import GOOD, PRINTING
from tests.covering import raw
from tests.layouts import (
    ONE_PROCESS,
    Layout,
    Trained,
    build_engine,
    run_config,
    train,
    train_steps,
    worst_state_error,
)
from tests.parallel.test_layouts import LOSS, NORM
from tests.pool import Pool

ZERO_KEYS = [setting for setting in SETTINGS.values() if setting.key.startswith("deepspeed.") and setting.is_open]
OF_ZERO_3 = [setting.name for setting in ZERO_KEYS if setting.used_with == ("zero_stage", ("3",))]
SMALLEST = {setting.name: int(setting.name == "reduce_bucket_size") for setting in ZERO_KEYS}
MIDDLE = {name: raw(name, "number") for name in SMALLEST}  # between the sizes of weights: some are larger
HUGE = dict.fromkeys(SMALLEST, 10**30)
OVERLAP = {"overlap_comm": True}
MIXTURE = {"experts.num_experts": 8, "experts.per_token": 2, "experts.hidden_size": 16}
WEIGHT = 1e-5  # as in test_matrix.py


def config_of(layout: Layout, mixture: bool, values: dict[str, Any]) -> Any:
    """With those of ``values`` that the ZeRO stage asks for."""
    keys = {name: value for name, value in values.items() if layout.zero_stage == 3 or name not in OF_ZERO_3}
    model = MIXTURE if mixture else {}
    # a large epsilon: the first steps are smooth in the gradient
    return run_config("llama", layout, optimizer={"eps": 1e-2}, model=model, deepspeed={"zero_optimization": keys})


def train_and_save(config: Any, folder: str, start: str | None = None) -> list[Trained]:
    """Two steps, a checkpoint and a third step; then the third once more, from ``start``."""
    from megatrain.checkpoint.load import load_checkpoint
    from megatrain.checkpoint.save import save_checkpoint

    engine = build_engine(config)
    try:
        train_steps(engine, 1, 2)
        save_checkpoint(engine, Path(folder), 2, "run", {})
        ran = [train_steps(engine, 3, 3)]
        if start is not None:
            load_checkpoint(engine, Path(start), lambda data, step: None)
            ran.append(train_steps(engine, 3, 3))
        return ran
    finally:
        engine.close()


def go_on(config: Any, start: str) -> Trained:
    """The third step, from a checkpoint."""
    from megatrain.checkpoint.load import load_checkpoint

    engine = build_engine(config)
    try:
        load_checkpoint(engine, Path(start), lambda data, step: None)
        return train_steps(engine, 3, 3)
    finally:
        engine.close()


@pytest.fixture(scope="module")
def one_process(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The third step of one process, without keys, and the checkpoint before it."""

    @functools.cache
    def ran(mixture: bool) -> tuple[Trained, str]:
        folder = tmp_path_factory.mktemp("one-process")
        [trained] = pool.run(train_and_save, 1, config_of(ONE_PROCESS, mixture, {}), str(folder))[0]
        return trained, checkpoint_in(folder)

    return ran


def checkpoint_in(folder: Path) -> str:
    (path,) = folder.glob("step-*")
    return str(path)


def check(ranks: list[Trained], reference: Trained, what: str) -> None:
    for trained in ranks:
        assert trained.losses == pytest.approx(reference.losses, rel=LOSS), what
        assert trained.grad_norms == pytest.approx(reference.grad_norms, rel=NORM), what
    error, name = worst_state_error(ranks, reference)
    assert error < WEIGHT, f"{what}: {name} differs by {error:.1e}"


def cases() -> list:
    """By default all keys at once, where they do most; each by itself with the marker."""

    def case(layout: Layout, values: dict[str, Any], name: str, slow: bool = True) -> Any:
        return pytest.param(layout, values, id=f"{layout}-{name}", marks=pytest.mark.slow if slow else ())

    zero_1, zero_2, zero_3 = (Layout(dp=2, zero_stage=stage) for stage in (1, 2, 3))
    few = [
        case(zero_3, SMALLEST | OVERLAP, "smallest", slow=False),
        case(zero_3, HUGE | OVERLAP, "huge", slow=False),
        case(Layout(dp=2, ep=2, zero_stage=2), MIDDLE | OVERLAP, "middle", slow=False),
        case(Layout(pp=2, zero_stage=1), SMALLEST, "smallest", slow=False),
    ]
    sizes = {"smallest": SMALLEST, "middle": MIDDLE, "huge": HUGE}
    tensor = Layout(tp=2, dp=2, zero_stage=3)
    for layout, size, name in product((zero_3, tensor), sizes, OF_ZERO_3):
        few.append(case(layout, {name: sizes[size][name]}, f"{name}-{size}"))
    for layout, size in product((zero_3, zero_2, Layout(dp=2, ep=2, zero_stage=2), tensor), sizes):
        few.append(case(layout, OVERLAP | {"reduce_bucket_size": sizes[size]["reduce_bucket_size"]}, f"overlap-{size}"))
    pipeline, experts = Layout(pp=2, dp=2, zero_stage=1), Layout(dp=2, ep=2, zero_stage=1)
    for layout, size in product((zero_1, zero_2, zero_3, pipeline, experts, tensor), sizes):
        few.append(case(layout, {"reduce_bucket_size": sizes[size]["reduce_bucket_size"]}, f"bucket-{size}"))
    return few


@pytest.mark.parametrize(("layout", "values"), cases())
def test_a_key_changes_neither_numbers_nor_checkpoints(
    pool: Pool, one_process: Any, memory_path: Path, layout: Layout, values: dict[str, Any]
) -> None:
    mixture = layout.ep > 1
    reference, start = one_process(mixture)
    ranks = pool.run(train_and_save, layout.world_size, config_of(layout, mixture, values), str(memory_path), start)
    check([ran[0] for ran in ranks], reference, "trained")
    check([ran[1] for ran in ranks], reference, "from the checkpoint of one process")
    other = Layout(tp=2) if layout.tp == 1 else Layout(dp=2, zero_stage=1)
    resumed = pool.run(go_on, 2, config_of(other, mixture, {}), checkpoint_in(memory_path))
    check(resumed, reference, f"its checkpoint, in {other}")


def train_twice(layout: Layout) -> bool:
    """Whether a run that prints everything has the bits of one that prints nothing."""
    from deepspeed.comm import comm

    printing: dict[str, Any] = {}
    for key in PRINTING:
        *outer, name = key.split(".")
        section = printing.setdefault(outer[0], {}) if outer else printing
        section[name] = GOOD[ALLOWED[key][0]]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            quiet, loud = (train("llama", layout, 2, deepspeed=deepspeed) for deepspeed in ({}, printing))
    finally:
        comm.comms_logger.enabled = False  # it is the process's
    assert comm.comms_logger.comms_dict, "every communication is logged"
    same = all(np.array_equal(loud.state[key][0], values) for key, (values, _) in quiet.state.items())
    return same and (loud.losses, loud.grad_norms) == (quiet.losses, quiet.grad_norms)


@pytest.mark.parametrize(
    "layout", [Layout(pp=2, dp=2, zero_stage=1), Layout(tp=2, zero_stage=3), Layout(cp=2, zero_stage=2)], ids=str
)
def test_keys_that_print_change_no_bit(pool: Pool, layout: Layout) -> None:
    assert all(pool.run(train_twice, layout.world_size, layout))
