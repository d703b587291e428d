"""A pickle in every slot of a checkpoint: nothing runs, whatever looks at it."""

import pickle
from contextlib import suppress
from pathlib import Path

import pytest

from launch.checkpoint import main
from megatrain.checkpoint.store.arrays import CheckpointReader
from megatrain.checkpoint.store.errors import CheckpointError
from megatrain.checkpoint.store.folder import LATEST, newest_checkpoint
from megatrain.checkpoint.store.lock import LOCK, FolderLock
from megatrain.checkpoint.tools.rebuild import rebuild_manifest
from tests.checkpoint.payload import Payload
from tests.checkpoint.test_store import small_save
from tests.checkpoint.test_store_damage import CHUNK, NAME, load_all

SLOTS = [
    "manifest.json",
    "tensors/zarr.json",
    "tensors/weight/zarr.json",
    f"tensors/weight/{NAME}/zarr.json",
    CHUNK,
]
BESIDE = ["payload.pkl", "tensors/weight/data.pkl", f"tensors/weight/{NAME}/c.9.9", "../" + LATEST, "../" + LOCK]


def payload(tmp_path: Path, size: int | None) -> bytes:
    data = pickle.dumps(Payload(tmp_path / "executed"))
    return data if size is None else data[:size].ljust(size, b"\0")


def look_at_everything(path: Path) -> None:
    """Every way in: none may run code. What they say is for other tests."""
    for arguments in (["ls", path.parent], ["verify", path], ["show", path], ["diff", path, path]):
        main([str(argument) for argument in arguments])
    newest_checkpoint(path.parent)
    for action in (lambda: load_all(path), lambda: rebuild_manifest(path), FolderLock(path.parent).take):
        with suppress(CheckpointError):
            action()


@pytest.mark.parametrize("same_size", [False, True])
@pytest.mark.parametrize("slot", SLOTS)
def test_a_pickle_in_a_slot_is_refused(tmp_path: Path, slot: str, same_size: bool) -> None:
    path = small_save(tmp_path / "checkpoints")
    size = (path / slot).stat().st_size if same_size else None
    (path / slot).write_bytes(payload(tmp_path, size))
    with pytest.raises(CheckpointError):
        CheckpointReader(path).require_files()
        load_all(path)
    look_at_everything(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("slot", BESIDE)
def test_a_pickle_beside_the_checkpoint_is_not_touched(tmp_path: Path, slot: str) -> None:
    path = small_save(tmp_path / "checkpoints")
    (path / slot).write_bytes(payload(tmp_path, None))
    load_all(path)
    look_at_everything(path)
    assert not (tmp_path / "executed").exists()


def test_the_payload_of_these_tests_works(tmp_path: Path) -> None:
    pickle.loads(payload(tmp_path, None))
    assert (tmp_path / "executed").is_dir()


@pytest.mark.parametrize("linked", ["tensors", "tensors/weight", f"tensors/weight/{NAME}", "tensors/zarr.json", CHUNK])
def test_a_rebuilt_manifest_follows_no_link(tmp_path: Path, linked: str) -> None:
    path = small_save(tmp_path / "checkpoints")
    (path / "manifest.json").unlink()
    (path / linked).rename(tmp_path / "outside")
    (path / linked).symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError):
        rebuild_manifest(path)
    assert not (path / "manifest.json").exists()
