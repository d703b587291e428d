"""A save that is cut short at the moments that matter most; test_kill.py kills it anywhere."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from megatrain.checkpoint.store.arrays import CheckpointReader, CheckpointWriter
from megatrain.checkpoint.store.errors import CheckpointError
from megatrain.checkpoint.store.folder import (
    clean_stumps,
    list_checkpoints,
    newest_checkpoint,
    publish,
    remove_checkpoint,
)
from megatrain.checkpoint.tools.rebuild import rebuild_manifest
from tests.checkpoint.test_store import VERSIONS, sample, small_save, write_array

OLD, NEW = 1, 2  # seeds of the data


def test_data_without_a_commit_does_not_exist(tmp_path):
    old = small_save(tmp_path, 1)
    writer = CheckpointWriter(tmp_path, 2, "run")
    writer.prepare()
    write_array(writer, "layers.0.weight", sample(4, 6), (2, 6))
    assert newest_checkpoint(tmp_path) == old
    writer.close()  # a killed one writes no more
    again = CheckpointWriter(tmp_path, 3, "run")
    assert again.prepare() == [writer.partial]
    assert not writer.partial.exists()


def loaded(folder):
    """Seed of the data in the newest checkpoint, read and compared in full, and its step."""
    reader = CheckpointReader(newest_checkpoint(folder))
    data = reader.read("weight", "layers.0.weight")
    seeds = [seed for seed in (OLD, NEW) if np.array_equal(data, sample(4, 6, seed=seed))]
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


def test_what_is_no_whole_checkpoint_is_set_aside(tmp_path: Path) -> None:
    """A step that lost its manifest may be rebuilt; a link leads to what is not ours; a file is somebody's."""
    lost = small_save(tmp_path, 1)
    (lost / "manifest.json").unlink()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").touch()
    (tmp_path / "step-00000002").symlink_to("elsewhere")
    (tmp_path / "step-00000003").write_text("notes")
    (tmp_path / "step-00000004").symlink_to("nowhere")
    (tmp_path / ".step-00000004.partial").symlink_to("elsewhere")
    (tmp_path / ".step-00000009.removed").write_text("mine")
    for step in (1, 2, 3, 4):
        assert CheckpointReader(small_save(tmp_path, step)).step == step
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step-0000000{step}" for step in (1, 2, 3, 4)]
    assert (tmp_path / "set-aside-1-step-00000001" / "tensors" / "zarr.json").is_file()
    assert (tmp_path / "set-aside-1-step-00000002" / "kept").exists()
    assert (tmp_path / "set-aside-1-step-00000003").read_text() == "notes"
    assert (tmp_path / "set-aside-1-step-00000004").is_symlink()
    assert (tmp_path / "set-aside-1-step-00000004.partial").is_symlink()
    assert (tmp_path / "set-aside-1-step-00000009.removed").read_text() == "mine"
    rebuild_manifest(tmp_path / "set-aside-1-step-00000001")
    remove_checkpoint(small_save(tmp_path, 5))
    (tmp_path / "step-00000006").symlink_to("elsewhere")
    remove_checkpoint(tmp_path / "step-00000006")
    assert (tmp_path / "elsewhere" / "kept").exists()
