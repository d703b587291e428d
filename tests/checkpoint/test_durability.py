"""What a power cut would find: the order in which a save asks the disk to confirm its files and names."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatrain.checkpoint.store import files
from megatrain.checkpoint.store.arrays import CheckpointReader
from megatrain.checkpoint.store.files import Files
from tests.checkpoint.test_store import sample, save

ARRAYS = {f"layers.{i}.weight": (sample(4, 6), (2, 6)) for i in range(3)}


def record(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(call, path) of every file that is opened to be written, of every ``fsync`` and rename, in their order."""
    calls: list[tuple[str, str]] = []
    fsync, replace, rename, write = os.fsync, Path.replace, Path.rename, Files._write

    def recorded_fsync(descriptor: int) -> None:
        fsync(descriptor)
        calls.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))

    def recorded_write(self: Files, path: Path, *rest: Any) -> Any:
        written = write(self, path, *rest)
        calls.append(("write", str(path)))
        return written

    def recorded(name: str, original: Any) -> Any:
        def call(path: Path, target: Path) -> Any:
            calls.append((name, str(target)))
            return original(path, target)

        return call

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Files, "_write", recorded_write)
    monkeypatch.setattr(Path, "replace", recorded("replace", replace))
    monkeypatch.setattr(Path, "rename", recorded("rename", rename))
    return calls


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="knows a descriptor's file by /proc")
def test_data_then_names_then_the_manifest_then_the_checkpoints_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = record(monkeypatch)
    final = save(tmp_path, 5, ARRAYS)
    monkeypatch.undo()
    partial = tmp_path / ".step-00000005.partial"
    manifest = calls.index(("replace", str(partial / "manifest.json")))
    published = calls.index(("rename", str(final)))
    assert manifest < published
    below = [partial / path.relative_to(final) for path in final.rglob("*") if path.name != "manifest.json"]
    data = [str(place) for place in below if (final / place.relative_to(partial)).is_file()]
    folders = {str(partial), *map(str, below)} - set(data)
    assert len(data) == 3 * 3 + 2
    last_file = 0
    for file in data:
        confirmed = calls.index(("fsync", file))
        assert calls.index(("write", file)) < confirmed < manifest, f"{file} is confirmed once it is written"
        last_file = max(last_file, calls.index(("write", file)))
    for folder in folders:
        assert last_file < calls.index(("fsync", folder)) < manifest, f"the names in {folder} are confirmed"
    content = ("fsync", str(partial / ".manifest.json.tmp"))
    assert calls.index(content) < manifest, "a name with nothing behind it is no manifest"
    assert ("fsync", str(partial)) in calls[manifest:published], "the manifest's name is confirmed"
    assert ("fsync", str(tmp_path)) in calls[published:], "the checkpoint's name is confirmed"


def test_files_wait_for_the_disk_together_but_not_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_OPEN", 8)
    waiting: list[int] = []
    confirm = files.Written.confirm

    def counted(written: files.Written) -> Any:
        waiting.append(len([name for name in os.listdir("/proc/self/fd") if opened(name)]))
        return confirm(written)

    def opened(name: str) -> bool:
        try:
            return os.readlink(f"/proc/self/fd/{name}").startswith(str(tmp_path))
        except FileNotFoundError:
            return False

    monkeypatch.setattr(files.Written, "confirm", counted)
    kept = Files()
    data = np.arange(1000, dtype=np.float32)
    for number in range(50):
        kept.write(tmp_path / str(number), "a chunk", data, lambda crc: None)
    kept.wait()
    kept.close()
    assert len(waiting) == 50
    assert 4 <= max(waiting) <= 8
    assert not any(map(opened, os.listdir("/proc/self/fd"))), "all are closed"
    assert all((tmp_path / str(number)).read_bytes()[:-4] == data.tobytes() for number in range(50))


def test_what_was_not_waited_for_is_closed(tmp_path: Path) -> None:
    kept = Files()
    kept.write(tmp_path / "file", "a chunk", np.zeros(10, np.float32), lambda crc: None)
    (pending,) = kept._pending
    kept.close()
    assert pending.result().file.closed


def test_a_large_chunk_is_written_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    monkeypatch.setattr(files, "_BLOCK", 2**10)
    monkeypatch.setattr(files, "_AHEAD", 2**12)
    monkeypatch.setattr(files, "begin_writeback", lambda descriptor: begun.append(os.fstat(descriptor).st_size))
    whole = sample(37, 101)
    reader = CheckpointReader(save(tmp_path, 1, {"a": (whole, (37, 101))}))
    np.testing.assert_array_equal(reader.read("weight", "a"), whole)
    assert {4096, 8192, 12288, 37 * 101 * 4 + 4} < set(begun), "the disk begins before the file ends"
