"""One owner of a folder at a time: a file that names the process that writes there, locked for as long as it does."""

import fcntl
import json
import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Self

from megatrain.checkpoint.store.errors import CheckpointError, explained
from megatrain.checkpoint.store.owner import Owner
from megatrain.disk.small import SMALL, read_open, read_regular, require_regular

LOCK = "owner.json"
BEAT = 5.0  # seconds between two signs of life
_BEATS = 3  # that must be missing before an owner that can't be seen is taken for dead
_PATIENCE = 1.0  # seconds for another start that is taking the folder over right now
_LEASE = 120.0  # seconds for a file server to give back what a dead host has locked
_OPEN = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK

_all: "weakref.WeakSet[FolderLock]" = weakref.WeakSet()


class FolderLock:
    """Holds ``folder/owner.json`` from ``take`` to ``release``; may be used in a ``with`` statement.

    The second job stops at its start. What a killed job left is taken over where that can be known: the file is locked
    by the system (``flock``) before it gets its name, and the system gives the lock of a dead process back, be it in
    another container. Whoever replaces a dead owner's file holds that file's lock, so that only one can. The file's
    time is changed every ``BEAT`` seconds: that is what counts where the system's lock does not reach the owner.
    """

    def __init__(self, folder: Path):
        self.path = folder / LOCK
        self._mine: Owner | None = None
        self._descriptor: int | None = None
        self._heart: tuple[threading.Thread, threading.Event] | None = None

    def take(self) -> Owner | None:
        """Returns the owner that was found dead, if any.

        Raises:
            CheckpointError: another job owns the folder, or it can't be written.
        """
        self._let_go()
        mine = Owner.here()
        with explained(f"take {self.path.parent} for this run"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            own_file = self.path.with_name(f".{LOCK}.{mine.token}")
            descriptor = os.open(own_file, _OPEN | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                os.write(descriptor, (json.dumps(asdict(mine), indent=2) + "\n").encode())
                _lock(descriptor)
                found = self._place(own_file)
            except BaseException:
                os.close(descriptor)
                raise
            finally:
                own_file.unlink(missing_ok=True)
        self._mine, self._descriptor = mine, descriptor
        _all.add(self)
        stop = threading.Event()
        self._heart = threading.Thread(target=_beat, args=(descriptor, stop), name="folder-lock", daemon=True), stop
        self._heart[0].start()
        return found

    def require(self) -> None:
        """Checks that the folder is still this process's; takes it again where somebody removed it.

        Raises:
            CheckpointError: another job has taken it, or it can't be looked at.
        """
        assert self._mine is not None, "take it first"
        with explained(f"see whether {self.path.parent} is still this run's"):
            owner = self._read()
        if owner is None:
            self.take()
        elif owner.token != self._mine.token:
            raise CheckpointError(f"{self.path.parent} was taken by {owner}: nothing is written there any more")

    def release(self) -> None:
        """Gives the folder back; what another job has taken stays its own."""
        with suppress(OSError):
            if self._mine is not None and (owner := self._read()) is not None and owner.token == self._mine.token:
                self.path.unlink()
        self._mine = None
        self._let_go()

    def _place(self, own_file: Path) -> Owner | None:
        """Gives ``own_file`` the lock's name, in place of a dead owner's; returns that one."""
        found, since = None, time.monotonic()
        while not _link(own_file, self.path):  # atomic, also where folders are shared over a network
            try:
                descriptor = os.open(self.path, _OPEN)
            except FileNotFoundError:
                continue  # given back just now
            try:
                require_regular(os.fstat(descriptor), self.path)
                found = Owner.parse(read_open(descriptor, SMALL, self.path))
                is_free = _lock(descriptor)
                if is_free is False:
                    self._wait_for(found, time.monotonic() - since)
                    continue
                if found is not None and self._lives(found, is_free):
                    raise self._refusal(found)
                with _alone(self.path, is_free):
                    if self._is(descriptor):
                        os.replace(own_file, self.path)
                        break
            finally:
                os.close(descriptor)
        return found

    def _wait_for(self, owner: Owner | None, waited: float) -> None:
        """Returns after a moment where the lock of ``owner`` may soon be free, though the owner itself is dead."""
        patience = 0.0 if owner is not None and owner.runs() else _PATIENCE
        if waited >= (_LEASE if owner is not None and owner.is_requeued else patience):
            raise self._refusal(owner)
        time.sleep(0.02)

    def _lives(self, owner: Owner, is_free: bool | None) -> bool:
        """Whether an owner whose file nobody has locked, as far as this host knows (None: nothing), may still run."""
        runs = owner.runs()
        if runs is not None:
            return runs
        if is_free and owner.is_of_this_boot:
            return False  # this kernel would know
        before = self.path.stat().st_mtime_ns
        for _ in range(10 * _BEATS):
            time.sleep(BEAT / 10)
            if self.path.stat().st_mtime_ns != before:
                return True
        return False

    def _refusal(self, owner: Owner | None) -> CheckpointError:
        return CheckpointError(
            f"{self.path.parent} belongs to {owner or 'another process'}. Wait for it or stop it; "
            f"if it is surely gone, delete {self.path} and start again"
        )

    def _is(self, descriptor: int) -> bool:
        """Whether the lock's file is still the one that was opened."""
        try:
            return os.path.samestat(os.fstat(descriptor), self.path.stat())
        except FileNotFoundError:
            return False

    def _read(self) -> Owner | None:
        """None: there is no such file, or it was torn by a full disk or edited; such a file protects nobody."""
        try:
            return Owner.parse(read_regular(self.path))
        except FileNotFoundError:
            return None

    def _let_go(self) -> None:
        """Ends the signs of life and gives the system's lock back, not the file."""
        if self._heart is not None:
            self._heart[1].set()
            self._heart[0].join()
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._heart = self._descriptor = None

    def forget(self) -> None:
        """Lets go of the lock in a forked process: the folder is its parent's, and must be free when that one dies."""
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._mine = self._heart = self._descriptor = None

    def __enter__(self) -> Self:
        self.take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _forget_all() -> None:
    for lock in list(_all):
        lock.forget()


os.register_at_fork(after_in_child=_forget_all)


def _beat(descriptor: int, stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        with suppress(OSError):
            os.utime(descriptor)


def _lock(descriptor: int) -> bool | None:
    """Locks an open file for this process; False: another one has it; None: this file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextmanager
def _alone(path: Path, is_locked: bool | None) -> Iterator[None]:
    """Only one process at a time is in the body: by the lock it has, else by a file that only one can make."""
    if is_locked:
        yield
        return
    guard = path.with_name(f".{path.name}.taking")
    try:
        os.close(os.open(guard, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
    except FileExistsError as error:
        raise CheckpointError(
            f"{path.parent} is being taken over by another start; if there is surely none, delete {guard}"
        ) from error
    try:
        yield
    finally:
        guard.unlink(missing_ok=True)


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except FileExistsError:
        # over a network an answer may be lost, and the call, made again, meet its own work
        with suppress(FileNotFoundError):
            return os.path.samestat(os.lstat(source), os.lstat(target))
        return False
    return True
