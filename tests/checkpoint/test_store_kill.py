"""A save that is killed at any call to the file system loses nothing that was committed."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatrain.checkpoint.errors import CheckpointError
from megatrain.checkpoint.folder import clean_stumps, newest_checkpoint, publish, remove_checkpoint
from megatrain.checkpoint.store import CheckpointReader, CheckpointWriter
from tests.checkpoint.test_store import VERSIONS, sample, small_save, write_array

CALLS = ("fsync", "mkdir", "rename", "replace", "rmdir", "unlink")
OLD, NEW = 1, 2  # seeds of the data


def test_data_without_a_commit_does_not_exist(tmp_path):
    old = small_save(tmp_path, 1)
    writer = CheckpointWriter(tmp_path, 2, "run")
    writer.prepare()
    write_array(writer, "layers.0.weight", sample(4, 6), (2, 6))
    assert newest_checkpoint(tmp_path) == old
    again = CheckpointWriter(tmp_path, 3, "run")
    assert again.prepare() == [writer.partial]
    assert not writer.partial.exists()


def save_until_killed(folder: Path, step: int, call: int) -> None:
    """Kills this process with SIGKILL right before call number ``call`` of the save to one of ``CALLS``."""
    calls = 0

    def counted(original):
        def function(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return function

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    small_save(folder, step, seed=NEW)


def kill_at_every_call(root: Path, step: int) -> None:
    """From a copy of ``root/start`` each: saves in a child that dies at call 1, 2, … until one survives its save."""
    for call in range(1, 1000):
        folder = root / f"killed-{call:03d}"
        shutil.copytree(root / "start", folder)
        child = os.fork()
        if child == 0:
            save_until_killed(folder, step, call)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if status == 0:
            return
        assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("step", [2, 1], ids=["next_step", "same_step"])
def test_killed_at_every_call(tmp_path, step):
    small_save(tmp_path / "start", 1, seed=OLD)
    program = f"from {__name__} import *; kill_at_every_call(Path(sys.argv[1]), int(sys.argv[2]))"
    repository = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program, tmp_path, str(step)], check=True, timeout=120, cwd=repository)
    seen = []
    for folder in sorted(tmp_path.glob("killed-*")):
        seed, reached = loaded(folder)
        assert reached == (1 if seed == OLD else step)
        seen.append(seed)
        stumps = clean_stumps(folder)
        assert loaded(folder) == (seed, reached), f"cleaning {stumps} lost the checkpoint"
        assert not list(folder.glob(".step*"))
        small_save(folder, 3, seed=3)
        assert loaded(folder) == (3, 3)
    assert len(seen) > 25
    assert seen == sorted(seen), "once the new checkpoint is there it stays"
    assert {OLD, NEW} == set(seen)


def loaded(folder):
    """Seed of the data in the newest checkpoint, read and compared in full, and its step."""
    reader = CheckpointReader(newest_checkpoint(folder))
    data = reader.read("weight", "layers.0.weight")
    seeds = [seed for seed in (OLD, NEW, 3) if np.array_equal(data, sample(4, 6, seed=seed))]
    assert len(seeds) == 1
    return seeds[0], reader.step


def test_the_old_one_stands_for_its_step_until_the_new_one_has_its_name(tmp_path, monkeypatch):
    small_save(tmp_path, 5, seed=OLD)
    writer = CheckpointWriter(tmp_path, 5, "run")
    writer.prepare()
    write_array(writer, "layers.0.weight", sample(4, 6, seed=NEW), (2, 6))
    rename = Path.rename

    def fails_at_the_new_name(path, target):
        if path == writer.partial:
            raise OSError("the moment between the two renames")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails_at_the_new_name)
    with pytest.raises(CheckpointError, match="between the two renames"):
        writer.commit(writer.records(), {}, VERSIONS)
    monkeypatch.undo()
    assert newest_checkpoint(tmp_path).name == ".step-00000005.replaced"
    assert loaded(tmp_path) == (OLD, 5)
    publish(tmp_path, 5)
    assert loaded(tmp_path) == (NEW, 5)


def test_a_removal_that_is_cut_short_leaves_no_checkpoint_with_holes(tmp_path, monkeypatch):
    small_save(tmp_path, 1, seed=OLD)
    doomed = small_save(tmp_path, 2, seed=NEW)

    def removes_one_file(path):
        next(path.rglob("c.*")).unlink()
        raise OSError("cut short")

    monkeypatch.setattr(shutil, "rmtree", removes_one_file)
    with pytest.raises(CheckpointError, match="cut short"):
        remove_checkpoint(doomed)
    monkeypatch.undo()
    assert loaded(tmp_path) == (OLD, 1)
    assert [path.name for path in clean_stumps(tmp_path)] == [".step-00000002.removed"]
