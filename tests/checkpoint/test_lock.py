"""One owner at a time; the dead give way."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatrain.checkpoint.errors import CheckpointError
from megatrain.checkpoint.lock import LOCK, FolderLock, Owner


def other_process(folder: Path, then: str) -> subprocess.Popen[str]:
    """A process that takes the folder, says so, and then does ``then``."""
    program = (
        "import os, sys, pathlib; from megatrain.checkpoint.lock import FolderLock;"
        f"lock = FolderLock(pathlib.Path({str(folder)!r})); lock.take(); print('taken', flush=True); {then}"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    return process


def test_the_second_is_told_who_owns_the_folder(tmp_path: Path) -> None:
    with other_process(tmp_path, "sys.stdin.read(); lock.release()") as process:
        with pytest.raises(
            CheckpointError, match=rf"belongs to process {process.pid} on {socket.gethostname()}.*delete"
        ):
            FolderLock(tmp_path).take()
        assert process.stdin is not None
        process.stdin.close()
    with FolderLock(tmp_path) as lock:
        lock.require()
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_a_killed_owner_gives_way(tmp_path: Path) -> None:
    with other_process(tmp_path, "os.kill(os.getpid(), 9)") as process:
        process.wait()
    lock = FolderLock(tmp_path)
    dead = lock.take()
    assert dead is not None
    assert dead.pid == process.pid
    assert FolderLock(tmp_path)._read() == lock._mine
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def write_owner(folder: Path, **changes: object) -> None:
    fields = {**vars(Owner.here()), **changes}
    (folder / LOCK).write_text(json.dumps(fields))


def test_a_process_number_that_was_given_again_is_another_process(tmp_path: Path) -> None:
    mine = Owner.here().started
    assert mine is not None
    boot, ticks = mine.split()
    for other in (f"{boot} {int(ticks) + 1}", f"another-boot {ticks}"):
        write_owner(tmp_path, started=other)
        assert FolderLock(tmp_path).take() is not None


def test_other_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    write_owner(tmp_path, host="elsewhere", job_id="16")
    with pytest.raises(CheckpointError, match=r"on elsewhere, job 16"):
        FolderLock(tmp_path).take()
    write_owner(tmp_path, host="elsewhere", job_id="17")  # Slurm requeued it
    assert FolderLock(tmp_path).take() is not None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 1}'])
def test_a_torn_file_protects_nobody(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK).write_text(content)
    assert FolderLock(tmp_path).take() is None


def test_a_lock_that_is_lost_during_the_run(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "checkpoints")
    lock.take()
    lock.path.unlink()
    lock.path.parent.rmdir()
    lock.require()
    assert lock.path.exists(), "a folder that was removed is taken again"
    write_owner(tmp_path / "checkpoints", pid=os.getppid(), token="another")
    with pytest.raises(CheckpointError, match=rf"was taken by process {os.getppid()}"):
        lock.require()
    lock.release()
    assert lock.path.exists(), "the other's"
