"""Saves in the background, and what goes wrong with them."""

import errno
import subprocess
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatrain.checkpoint.store.arrays import CheckpointReader
from megatrain.checkpoint.store.errors import CheckpointError
from megatrain.checkpoint.store.folder import list_checkpoints, newest_checkpoint
from tests.checkpoint.test_resume import engine_of
from tests.layouts import Layout, train_steps
from tests.pool import Pool

TWO_RANKS = Layout(dp=2, zero_stage=1)


def saver_of(engine: Any, folder: str, **options: Any) -> Any:
    from megatrain.checkpoint.save import Saver

    return Saver(engine, Path(folder), "test", **options)


def begin(saver: Any, step: int) -> None:
    saver.begin(step, {"data": {}, "tokens": 0}, {})


def train_during_a_save(folder: str, layout: Layout) -> dict[str, Any]:
    """The same step saved before training goes on, and again while it does."""
    from megatrain.checkpoint.store.files import Files

    engine = engine_of("llama", layout)
    original, gate = Files._write, threading.Event()

    def behind_the_gate(*args: Any) -> Any:
        gate.wait()
        return original(*args)

    try:
        train_steps(engine, 1, 2)
        waiting = saver_of(engine, f"{folder}/foreground", background=False)
        begin(waiting, 2)
        foreground = waiting.finish()
        Files._write = behind_the_gate  # type: ignore[method-assign]
        saver = saver_of(engine, f"{folder}/background")
        begin(saver, 2)
        engine.train_step(global_share(engine, 3), 3)
        in_flight = not saver.has_news
        gate.set()
        background = saver.finish()
        begin(saver, 3)
        return {"outcomes": [foreground, background, saver.finish()], "in_flight": in_flight}
    finally:
        Files._write = original  # type: ignore[method-assign]
        engine.close()


def global_share(engine: Any, step: int) -> Any:
    from tests.layouts import global_batch

    return global_batch(step, engine.mesh.coordinate("dp"), engine.mesh.topology.dp)


@pytest.mark.parametrize("layout", [TWO_RANKS, Layout(dp=2, zero_stage=3), Layout(tp=2, dp=2, zero_stage=0)], ids=str)
def test_training_goes_on_during_a_save(pool: Pool, memory_path: Path, layout: Layout) -> None:
    ranks = pool.run(train_during_a_save, layout.world_size, str(memory_path), layout)
    for rank in ranks:
        foreground, background, second = rank["outcomes"]
        assert rank["in_flight"]
        assert foreground.problem is background.problem is second.problem is None
        assert (background.path, background.num_bytes) == (ranks[0]["outcomes"][1].path, foreground.num_bytes)
    one, two = (CheckpointReader(outcome.path) for outcome in ranks[0]["outcomes"][:2])
    assert one.arrays.keys() == two.arrays.keys()
    for key in one.arrays:
        np.testing.assert_array_equal(one.read(*key), two.read(*key), err_msg="the step after the copy shows")
    three = CheckpointReader(ranks[0]["outcomes"][2].path)
    assert not all(np.array_equal(three.read(*key), two.read(*key)) for key in two.arrays)
    stored = sum(spec.file_bytes - 4 for spec in one.arrays.values() for _ in spec.indices())
    assert foreground.num_bytes == stored, "each weight and moment once"


def fail_on_one_rank(folder: str, failing_rank: int) -> list[Any]:
    """A good save, one whose disk is full on one rank, and a good one after it."""
    from megatrain.checkpoint.store.files import Files

    engine = engine_of("llama", TWO_RANKS)
    original = Files._write

    def full(self: Any, path: Path, label: str, *rest: Any) -> Any:
        from megatrain.checkpoint.store.errors import explained

        if engine.mesh.rank == failing_rank and label.startswith("exp_avg of"):
            with explained(f"write {label} to {path}"):
                raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, path, label, *rest)

    saver = saver_of(engine, folder)
    outcomes = []
    try:
        for step, write in ((1, original), (2, full), (3, original)):
            Files._write = write  # type: ignore[method-assign]
            engine.train_step(global_share(engine, step), step)
            begin(saver, step)
            engine.evaluate(global_share(engine, step))
            outcomes.append(saver.finish())
        return outcomes
    finally:
        Files._write = original  # type: ignore[method-assign]
        engine.close()


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_failed_save_is_everyones_and_harms_nothing(pool: Pool, memory_path: Path, failing_rank: int) -> None:
    ranks = pool.run(fail_on_one_rank, 2, str(memory_path), failing_rank)
    for good, failed, later in ranks:
        assert good.problem is later.problem is None
        assert failed.problem.startswith(f"rank {failing_rank}: cannot write exp_avg of ")
        assert "No space left on device (ENOSPC)" in failed.problem
        assert failed.notes == (), "a full disk is not tried again"
    assert [path.name for path in list_checkpoints(memory_path)] == ["step-00000001", "step-00000003"]
    assert not list(memory_path.glob(".step*")), "the space is given back"


def save_on_a_small_disk(folder: str, told_free: int | None) -> list[Any]:
    from megatrain.checkpoint.store import folder as layout

    engine = engine_of("llama", TWO_RANKS)
    usage = layout.shutil.disk_usage
    if told_free is not None:  # as where somebody else fills the disk after the check
        layout.shutil.disk_usage = lambda path: SimpleNamespace(free=told_free)  # type: ignore[assignment]
    try:
        saver = saver_of(engine, folder)
        begin(saver, 1)
        return [saver.finish(), saver._shares.total_bytes]
    finally:
        layout.shutil.disk_usage = usage
        engine.close()


@pytest.mark.parametrize("told_free", [None, 10**12], ids=["refused", "filled-later"])
def test_a_full_disk(pool: Pool, small_disk: Path, told_free: int | None) -> None:
    for outcome, total in pool.run(save_on_a_small_disk, 2, str(small_disk), told_free):
        if told_free is None:
            assert f"no room for a checkpoint in {small_disk}: it needs {total} bytes" in outcome.problem
        else:
            assert "No space left on device (ENOSPC)" in outcome.problem
    assert not list(small_disk.iterdir()), "nothing is left on the disk"


def save_without_memory(folder: str) -> list[Any]:
    """Rank 1 finds no host memory for its first copy; the last value is the MiB of its weights."""
    from megatrain.engine.state import local_fragments

    engine = engine_of("llama", TWO_RANKS)
    saver = saver_of(engine, folder)
    copy = saver._staging.copy
    outcomes = []

    def fails(pieces: Any) -> Any:
        raise MemoryError("DefaultCPUAllocator: can't allocate memory")

    try:
        for step, action in ((1, fails), (2, copy)):
            saver._staging.copy = action if engine.mesh.rank == 1 else copy
            begin(saver, step)
            outcomes.append(saver.finish())
        values = sum(fragment.size for fragment in local_fragments(engine))
        return [*outcomes, values * 4 / 2**20]
    finally:
        engine.close()


def test_no_memory_for_the_copy(pool: Pool, memory_path: Path) -> None:
    ranks = pool.run(save_without_memory, 2, str(memory_path))
    for failed, later, _ in ranks:
        kinds = ", ".join(f"{kind} {ranks[1][2]:.2f} MiB" for kind in ("weight", "exp_avg", "exp_avg_sq"))
        assert failed.problem.startswith(f"rank 1: no memory to copy this rank's state aside ({kinds}): DefaultCPU")
        assert "set checkpoint.background: false" in failed.problem
        assert later.problem is None
    assert [path.name for path in list_checkpoints(memory_path)] == ["step-00000002"]


def save_three_times(folder: str, actions: list[str]) -> list[Any]:
    engine = engine_of("llama", TWO_RANKS)
    saver = saver_of(engine, folder)
    outcomes = []
    try:
        for step, action in enumerate(actions, 1):
            if action and engine.mesh.rank == 0:
                subprocess.run(action, shell=True, check=True)
            begin(saver, step)
            outcomes.append(saver.finish())
        return outcomes
    finally:
        engine.close()


def test_a_read_only_disk(pool: Pool, small_disk: Path) -> None:
    remount = f"mount -o remount,size=64m,{{}} {small_disk}"
    ranks = pool.run(
        save_three_times, 2, str(small_disk / "run"), [remount.format(mode) for mode in ("rw", "ro", "rw")]
    )
    for good, failed, later in ranks:
        assert good.problem is later.problem is None
        assert "Read-only file system (EROFS)" in failed.problem
    assert [path.name for path in list_checkpoints(small_disk / "run")] == ["step-00000001", "step-00000003"]


def test_a_folder_that_is_removed_during_the_run(pool: Pool, memory_path: Path) -> None:
    folder = memory_path / "run" / "checkpoints"
    ranks = pool.run(save_three_times, 2, str(folder), ["", f"rm -r {folder.parent}", ""])
    assert [outcome.problem for outcomes in ranks for outcome in outcomes] == [None] * 6
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000002", "step-00000003"]


def retain(folder: str) -> list[Any]:
    from megatrain.checkpoint.store.retention import Retention

    engine = engine_of("llama", Layout())
    saver = saver_of(engine, folder, retention=Retention(keep_last=2, keep_every=3))
    try:
        outcomes = []
        for step in range(1, 7):
            begin(saver, step)
            outcomes.append(saver.finish())
        return outcomes
    finally:
        engine.close()


def test_retention_after_each_save(pool: Pool, memory_path: Path) -> None:
    outcomes = pool.run(retain, 1, str(memory_path))[0]
    assert [path.name for path in list_checkpoints(memory_path)] == [f"step-0000000{step}" for step in (3, 5, 6)]
    assert [len(outcome.notes) for outcome in outcomes] == [0, 0, 1, 1, 0, 1]


def lose_the_lock(folder: str, during: bool) -> Any:
    """Another takes the folder before a save looks, or after it has."""
    from megatrain.checkpoint.store.lock import FolderLock

    engine = engine_of("llama", Layout())
    lock = FolderLock(Path(folder))
    lock.take()
    saver = saver_of(engine, folder, lock=lock)
    prepare = saver._prepare

    def lose() -> None:
        lock.path.write_text(lock.path.read_text().replace(lock._mine.token, "another"))  # type: ignore[union-attr]

    def prepare_and_lose(writer: Any) -> list[str]:
        notes = prepare(writer)
        lose()
        return notes

    try:
        if during:
            saver._prepare = prepare_and_lose
        else:
            lose()
        begin(saver, 1)
        return saver.finish()
    finally:
        engine.close()


@pytest.mark.parametrize("during", [False, True])
def test_nothing_is_written_into_the_folder_of_another_job(pool: Pool, memory_path: Path, during: bool) -> None:
    outcome = pool.run(lose_the_lock, 1, str(memory_path), during)[0]
    assert "was taken by process" in outcome.problem
    assert newest_checkpoint(memory_path) is None
    assert [path.name for path in memory_path.iterdir()] == ["owner.json"]


def test_a_single_save_raises(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("where the folder should be")
    assert "File exists (EEXIST)" in pool.run(save_into_a_file, 1, str(tmp_path / "file"))[0]


def save_into_a_file(folder: str) -> str:
    from megatrain.checkpoint.save import save_checkpoint

    engine = engine_of("llama", Layout())
    try:
        with pytest.raises(CheckpointError) as error:
            save_checkpoint(engine, Path(folder), 1, "test", {})
        return str(error.value)
    finally:
        engine.close()
