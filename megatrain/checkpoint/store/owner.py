"""Who owns a folder: a process, and how another process tells whether it still runs."""

import json
import os
import socket
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True)
class Owner:
    """A process: ``started`` tells it from a later one of the same ``pid``, ``pid_namespace`` where that number counts.

    No clock that may be set plays a part, and the host's name alone says nothing: containers share names.
    """

    host: str
    pid: int
    started: str | None
    job_id: str | None
    since: str
    token: str
    pid_namespace: str | None = None

    @classmethod
    def here(cls) -> Self:
        """This process."""
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            started=_start_of("self"),
            job_id=os.environ.get("SLURM_JOB_ID"),
            since=datetime.now(UTC).isoformat(timespec="seconds"),
            token=uuid.uuid4().hex,
            pid_namespace=_pid_namespace(),
        )

    @classmethod
    def parse(cls, content: bytes) -> Self | None:
        """What the file ``content`` says; None: torn by a full disk or edited."""
        try:
            fields: dict[str, Any] = json.loads(content)
            return cls(**fields)
        except (ValueError, TypeError, RecursionError):
            return None

    def __str__(self) -> str:
        job = f", job {self.job_id}" if self.job_id else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"

    @property
    def is_of_this_boot(self) -> bool:
        """Whether it ran, or runs, under this very kernel, in whatever container."""
        return self.started is not None and self.started.split()[:1] == [_boot()]

    @property
    def is_requeued(self) -> bool:
        """Whether it was an earlier start of this process's own Slurm job, on another host."""
        return not self.is_of_this_boot and self.job_id is not None and self.job_id == os.environ.get("SLURM_JOB_ID")

    def runs(self) -> bool | None:
        """Whether it runs; None: that can't be seen from here (another process namespace, or a host of this name)."""
        if self.is_of_this_boot:
            if _start_of(self.pid) == self.started:
                return True
            return False if self.pid_namespace is not None and self.pid_namespace == _pid_namespace() else None
        if self.host != socket.gethostname():
            return not self.is_requeued
        return None


def _start_of(pid: int | str) -> str | None:
    """The boot of this host and the clock ticks from it to the start of a process; None if it runs no more.

    (psutil gives the start by the clock of today: after the clock was set, a living owner would look like another.)
    """
    try:
        words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, ticks = words[0], words[19]
    return None if state == "Z" else f"{_boot()} {ticks}"


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return "unknown"


def _pid_namespace() -> str | None:
    """The name space of process numbers here; None where /proc does not show that of this process."""
    try:
        return os.readlink("/proc/self/ns/pid") if os.readlink("/proc/self") == str(os.getpid()) else None
    except OSError:
        return None
