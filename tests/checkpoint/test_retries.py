"""Errors of the disk that may pass: tried again, a few times, and told."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch import pretrain
from megatrain.checkpoint.store import arrays as store
from megatrain.checkpoint.store import errors, tree
from megatrain.checkpoint.store.arrays import CheckpointReader
from megatrain.checkpoint.store.errors import CheckpointError, StorageError, TransientError, persistently
from megatrain.checkpoint.store.folder import list_checkpoints
from tests.checkpoint.test_resume import engine_of
from tests.checkpoint.test_save import TWO_RANKS, begin, global_share, saver_of
from tests.checkpoint.test_store import sample, small_save
from tests.pool import Pool

NO_PAUSES = (0.0, 0.0)


def failing(original: Any, code: int, times: int) -> Any:
    """``original``, whose first calls fail with the error ``code``."""
    left = [times]

    def call(*args: Any, **kwargs: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise OSError(code, os.strerror(code))
        return original(*args, **kwargs)

    return call


def save_on_a_bad_disk(folder: str) -> list[Any]:
    """Of three saves rank 1's disk can't confirm one file of the first once, and none of the second."""
    from megatrain.checkpoint import save

    engine = engine_of("llama", TWO_RANKS)
    pauses, save.PAUSES = save.PAUSES, NO_PAUSES
    fsync = os.fsync
    saver = saver_of(engine, folder)
    outcomes = []
    try:
        for step, (code, times) in enumerate([(errno.EIO, 1), (errno.ESTALE, 10**6), (0, 0)], 1):
            if engine.mesh.rank == 1:
                os.fsync = failing(fsync, code, times)
            engine.train_step(global_share(engine, step), step)
            begin(saver, step)
            outcomes.append(saver.finish())
        return outcomes
    finally:
        os.fsync, save.PAUSES = fsync, pauses
        engine.close()


def test_a_save_is_tried_again_and_not_forever(pool: Pool, memory_path: Path) -> None:
    for second_try, never, later in pool.run(save_on_a_bad_disk, 2, str(memory_path)):
        assert second_try.problem is later.problem is None
        (note,) = second_try.notes
        assert note.startswith("attempt 1 to save step 1 failed, the next one begins in 0 s: rank 1: cannot write ")
        assert "Input/output error (EIO)" in note
        assert never.problem.startswith("rank 1: cannot write ")
        assert never.problem.endswith("Stale file handle (ESTALE); tried 3 times")
        assert len(never.notes) == 2
        assert later.notes == ()
    assert [path.name for path in list_checkpoints(memory_path)] == ["step-00000001", "step-00000003"]
    assert not list(memory_path.glob(".step*")), "the space of failed attempts is given back"
    for path in list_checkpoints(memory_path):
        reader = CheckpointReader(path)
        for key in reader.arrays:
            reader.read(*key)


@pytest.mark.parametrize("call", ["tree.read_with_crc", "Tree.open", "Manifest.from_bytes"])
def test_a_load_is_tried_again_and_not_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    monkeypatch.setattr(errors, "PAUSES", NO_PAUSES)
    path = small_save(tmp_path)
    outer, name = call.split(".")
    place = tree if outer == "tree" else getattr(store, outer)
    original = getattr(place, name)
    monkeypatch.setattr(place, name, failing(original, errno.ESTALE, 2))
    np.testing.assert_array_equal(CheckpointReader(path).read("weight", "layers.0.weight"), sample(4, 6))
    monkeypatch.setattr(place, name, failing(original, errno.ESTALE, 3))
    with pytest.raises(CheckpointError, match=rf"{path}.*Stale file handle \(ESTALE\); tried 3 times"):
        CheckpointReader(path).read("weight", "layers.0.weight")


def test_a_look_at_the_files_waits_once_for_a_disk_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = CheckpointReader(small_save(tmp_path))
    pauses: list[float] = []
    monkeypatch.setattr(errors.time, "sleep", pauses.append)
    monkeypatch.setattr("megatrain.checkpoint.store.tree.os.lstat", failing(None, errno.EIO, 10**6))
    with pytest.raises(TransientError, match=r"c\.0\.0: Input/output error \(EIO\); tried 3 times"):
        reader.require_files()
    assert pauses == list(errors.PAUSES)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_what_does_not_pass_is_not_tried_again(code: int) -> None:
    calls = []

    def action() -> None:
        calls.append(code)
        with errors.explained("write"):
            raise OSError(code, os.strerror(code))

    with pytest.raises(CheckpointError, match=errno.errorcode[code]):
        persistently(action)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("error", "code"), [(StorageError("3 checkpoints in a row were not saved"), 74), (CheckpointError("another's"), 2)]
)
def test_storage_that_failed_has_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, code: int
) -> None:
    def fails(*args: Any) -> None:
        raise error

    monkeypatch.setattr(pretrain, "resolved_config", fails)
    assert pretrain.main([]) == code
    assert capsys.readouterr().err == f"error: {error}\n"
