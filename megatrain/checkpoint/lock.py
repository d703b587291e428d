"""One owner of a folder at a time: a file that names the process that writes there."""

import json
import os
import socket
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatrain.checkpoint.errors import CheckpointError, explained

LOCK = "owner.json"


@dataclass(frozen=True)
class Owner:
    """A process: ``started`` tells it from a later one with the same ``pid``. No clock that may be set plays a part."""

    host: str
    pid: int
    started: str | None
    job_id: str | None
    since: str
    token: str

    @classmethod
    def here(cls) -> Self:
        """This process."""
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            started=_start_of(os.getpid()),
            job_id=os.environ.get("SLURM_JOB_ID"),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
            token=uuid.uuid4().hex,
        )

    def __str__(self) -> str:
        job = f", job {self.job_id}" if self.job_id else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"

    def is_gone(self) -> bool:
        """Whether it surely runs no more: dead on this host, or an earlier start of this process's own Slurm job."""
        if self.host != socket.gethostname():
            return self.job_id is not None and self.job_id == os.environ.get("SLURM_JOB_ID")
        return _start_of(self.pid) != self.started


def _start_of(pid: int) -> str | None:
    """The boot of this host and the clock ticks from it to the start of a process; None if it runs no more.

    (psutil gives the start by the clock of today: after the clock was set, a living owner would look like another.)
    """
    try:
        words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    state, ticks = words[0], words[19]
    return None if state == "Z" else f"{boot} {ticks}"


class FolderLock:
    """Holds ``folder/owner.json`` from ``take`` to ``release``; may be used in a ``with`` statement.

    The second job stops at its start. What a killed job left is taken over where that can be known.
    """

    def __init__(self, folder: Path):
        self.path = folder / LOCK
        self._mine: Owner | None = None

    def take(self) -> Owner | None:
        """Returns the owner that was found dead, if any.

        Raises:
            CheckpointError: another job owns the folder, or it can't be written.
        """
        mine, found = Owner.here(), None
        with explained(f"take {self.path.parent} for this run"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            own_file = self.path.with_name(f".{LOCK}.{mine.token}")
            own_file.write_text(json.dumps(asdict(mine), indent=2) + "\n", encoding="utf-8")
            try:
                while not _link(own_file, self.path):  # atomic, also where folders are shared over a network
                    found = self._set_aside(own_file.with_suffix(".dead"))
            finally:
                own_file.unlink()
        self._mine = mine
        return found

    def require(self) -> None:
        """Checks that the folder is still this process's; takes it again where somebody removed it.

        Raises:
            CheckpointError: another job has taken it.
        """
        assert self._mine is not None, "take it first"
        owner = self._read()
        if owner is None:
            self.take()
        elif owner.token != self._mine.token:
            raise CheckpointError(f"{self.path.parent} was taken by {owner}: nothing is written there any more")

    def release(self) -> None:
        """Gives the folder back; what another job has taken stays its own."""
        with suppress(CheckpointError, OSError):
            if self._mine is not None and (owner := self._read()) is not None and owner.token == self._mine.token:
                self.path.unlink()
        self._mine = None

    def _set_aside(self, place: Path) -> Owner | None:
        """Moves a dead owner's file out of the way; refuses to move a living one's."""
        owner = self._read()
        if owner is not None and not owner.is_gone():
            raise CheckpointError(
                f"{self.path.parent} belongs to {owner}. Wait for it or stop it; "
                f"if it is surely gone, delete {self.path} and start again"
            )
        with suppress(FileNotFoundError):
            self.path.rename(place)
            moved = _parse(place)
            if moved is not None and owner is not None and moved.token != owner.token:  # somebody was quicker
                _link(place, self.path)
            place.unlink()
        return owner

    def _read(self) -> Owner | None:
        try:
            return _parse(self.path)
        except FileNotFoundError:
            return None

    def __enter__(self) -> Self:
        self.take()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _parse(path: Path) -> Owner | None:
    """None: torn by a full disk or edited; such a file protects nobody."""
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Owner(**fields)
    except (ValueError, TypeError):
        return None


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    return True
