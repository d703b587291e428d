"""One owner at a time; the dead give way."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatrain.checkpoint.store import lock as lock_module
from megatrain.checkpoint.store.errors import CheckpointError
from megatrain.checkpoint.store.lock import LOCK, FolderLock
from megatrain.checkpoint.store.owner import Owner


@pytest.fixture(autouse=True)
def fast_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "BEAT", 0.05)
    monkeypatch.setattr(lock_module, "_PATIENCE", 0.1)


def other_process(folder: Path, then: str, *before: str) -> subprocess.Popen[str]:
    """A process that takes the folder, says so, and then does ``then``; ``before``: words before its command."""
    program = (
        "import os, sys, pathlib; from megatrain.checkpoint.store.lock import FolderLock;"
        f"lock = FolderLock(pathlib.Path({str(folder)!r})); lock.take(); print('taken', flush=True); {then}"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [*before, sys.executable, "-c", program], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
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
        lock = FolderLock(tmp_path)
        assert lock.take() is not None
        lock.release()


def test_other_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    elsewhere = {"host": "elsewhere", "started": "another-boot 1"}
    write_owner(tmp_path, **elsewhere, job_id="16")
    with pytest.raises(CheckpointError, match=r"on elsewhere, job 16"):
        FolderLock(tmp_path).take()
    write_owner(tmp_path, **elsewhere, job_id="17")  # Slurm requeued it
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


IN_A_CONTAINER = ("unshare", "--pid", "--fork", "--mount-proc")


def may_make_containers() -> bool:
    words = [*IN_A_CONTAINER, "true"]
    return shutil.which("unshare") is not None and subprocess.run(words, capture_output=True).returncode == 0


def test_an_owner_in_another_container_of_the_same_name_lives(tmp_path: Path) -> None:
    """Its process number means nothing here, or another process; only the kernel knows both."""
    if not may_make_containers():
        pytest.skip("may not make process namespaces")
    with other_process(tmp_path, "sys.stdin.read(); os.kill(os.getpid(), 9)", *IN_A_CONTAINER) as process:
        owner = FolderLock(tmp_path)._read()
        assert owner is not None
        assert (owner.host, owner.pid) == (socket.gethostname(), 1)
        with pytest.raises(CheckpointError, match=rf"belongs to process 1 on {owner.host}"):
            FolderLock(tmp_path).take()
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    with FolderLock(tmp_path) as lock:
        assert lock._read() == lock._mine


def beating(path: Path, stop: threading.Event) -> threading.Thread:
    def beat() -> None:
        while not stop.wait(0.02):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    return thread


@pytest.mark.parametrize("unseen", ["namespace", "boot"])
def test_where_the_system_knows_nothing_signs_of_life_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unseen: str
) -> None:
    """A file system without locks, and an owner that no process number can be held against."""
    monkeypatch.setattr(lock_module, "_lock", lambda descriptor: None)
    boot = str(Owner.here().started).split()[0]
    changes = {"namespace": {"started": f"{boot} 1", "pid_namespace": "pid:[1]"}, "boot": {"started": "other 1"}}
    write_owner(tmp_path, **changes[unseen])
    stop = threading.Event()
    thread = beating(tmp_path / LOCK, stop)
    with pytest.raises(CheckpointError, match="belongs to process"):
        FolderLock(tmp_path).take()
    stop.set()
    thread.join()
    with FolderLock(tmp_path) as lock:
        first = lock.path.stat().st_mtime_ns
        time.sleep(0.2)
        assert lock.path.stat().st_mtime_ns > first, "it gives signs of life itself"


def test_a_forked_process_does_not_keep_its_dead_parents_folder(tmp_path: Path) -> None:
    forked = "child = os.fork(); child or (os.close(1), sys.stdin.read(), os._exit(0)); os.kill(os.getpid(), 9)"
    with other_process(tmp_path, forked) as process:
        process.wait()
        dead = FolderLock(tmp_path).take()
    assert dead is not None
    assert dead.pid == process.pid


STARTS = """
import multiprocessing, os, pathlib, random, sys, time
from megatrain.checkpoint.store import lock as module
from megatrain.checkpoint.store.errors import CheckpointError

def slowed(action):
    def slow(*words, **named):
        time.sleep(0.001 * random.random())
        return action(*words, **named)
    return slow

def start(number):
    random.seed(number)
    for name in ("link", "rename", "replace", "unlink", "open"):
        setattr(os, name, slowed(getattr(os, name)))
    pathlib.Path.rename = slowed(pathlib.Path.rename)
    if sys.argv[2] == "no_locks":
        module._lock = lambda descriptor: None
    for place in places:
        barrier.wait()
        lock = module.FolderLock(place)
        try:
            lock.take()
            (place / f"owned-by-{number}").touch()
        except CheckpointError:
            pass
        barrier.wait()
        lock.release()

places = sorted(pathlib.Path(sys.argv[1]).iterdir())
context = multiprocessing.get_context("fork")
barrier = context.Barrier(4)
processes = [context.Process(target=start, args=(number,)) for number in range(4)]
for process in processes:
    process.start()
for process in processes:
    process.join()
"""


@pytest.mark.parametrize("system", ["locks", "no_locks"])
def test_of_many_starts_one_takes_a_dead_owners_folder(tmp_path: Path, system: str) -> None:
    """Each start is slowed down at every step, differently: that shows a gap between looking and taking at once."""
    boot = str(Owner.here().started).split()[0]
    for number in range(40):
        (tmp_path / str(number)).mkdir()
        write_owner(tmp_path / str(number), started=f"{boot} 1", token="dead")
    words = [sys.executable, "-c", STARTS, str(tmp_path), system]
    subprocess.run(words, check=True, timeout=60, cwd=Path(__file__).parents[2])
    assert [len(list(place.glob("owned-by-*"))) for place in tmp_path.iterdir()] == [1] * 40


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


@pytest.mark.timeout(10)
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (os.mkfifo, "a pipe, not a regular file"),
        (os.mkdir, "Is a directory|a folder, not"),
        (lambda path: path.symlink_to("/dev/zero"), "ELOOP"),
        (lambda path: path.symlink_to("nowhere"), "ELOOP"),
        (make_socket, "ENXIO|a socket, not"),
        (lambda path: (path.touch(), os.truncate(path, 2**38)), "it holds 274877906944 bytes"),
    ],
)
def test_what_is_no_lock_file_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make, message: str
) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    make(Path(LOCK))
    with pytest.raises(CheckpointError, match=message) as error:
        FolderLock(tmp_path).take()
    assert str(tmp_path) in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
