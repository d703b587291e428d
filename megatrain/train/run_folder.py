"""The folder that everything of a run goes into."""

import json
import platform
import socket
import subprocess
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Self

from megatrain.config.schema import RunConfig
from megatrain.config.show import to_yaml
from megatrain.disk.durable import write_durably

_PACKAGES = ("megatrain", "torch", "deepspeed", "megatron-core")


class RunFolderError(Exception):
    """The run folder cannot be used; the text says why and what to do."""


class RunFolder:
    """Places inside a run's folder. Making the object touches nothing; ``prepare`` makes the folder.

    ``config``: the resolved config of the latest start; ``versions``: what that start ran on;
    ``metrics``: one JSON object a line; ``data``: which samples the latest start reads at which step.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.metrics = self.path / "metrics.jsonl"
        self.config = self.path / "config.yaml"
        self.versions = self.path / "versions.json"
        self.data = self.path / "data.json"
        self._id_file = self.path / "run_id"

    @classmethod
    def of(cls, config: RunConfig) -> Self:
        """The folder that ``config`` names."""
        return cls(Path(config.folder) / config.name)

    def prepare(self, config: RunConfig) -> None:
        """Makes the folder and records the resolved ``config`` and the versions. One process does it: rank 0.

        Raises:
            RunFolderError: it cannot be made or written.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.tensorboard.mkdir(exist_ok=True)
            if not self._id_file.exists():
                write_durably(self._id_file, (uuid.uuid4().hex + "\n").encode())
            write_durably(self.config, (to_yaml(config)).encode())
            write_durably(self.versions, (json.dumps(versions(), indent=2) + "\n").encode())
            with self.metrics.open("a"):
                pass  # it may be there from an earlier start, and belong to somebody else
        except OSError as error:
            raise RunFolderError(
                f"cannot write the run folder {self.path.absolute()}: {error.strerror} ({error.filename}). "
                "Set `folder` to a place that this user can write."
            ) from error

    @property
    def run_id(self) -> str:
        """Made once, by the first ``prepare``; every resumed start keeps it."""
        return self._id_file.read_text(encoding="utf-8").strip()


def versions() -> dict[str, str | None]:
    """Of the programs that take part, and host and time of this start."""
    return {
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        "git_commit": _git_commit(),
        "host": socket.gethostname(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def other_versions(saved: Mapping[str, str]) -> list[str]:
    """Each program whose version differs from the one that saved a checkpoint, with both."""
    here = versions()
    names = [name for name in ("python", *_PACKAGES) if name in saved and saved[name] != here[name]]
    return [f"{name} {saved[name]} then, {here[name]} now" for name in names]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from its source, not installed
        return None


def _git_commit() -> str | None:
    """The commit of megatrain's source, None where it does not stand in a git repository."""
    source = Path(__file__)
    # an installed copy may stand inside the repository of another project, whose commit says nothing
    if _git("ls-files", "--error-unmatch", source.name, folder=source.parent) is None:
        return None
    return _git("rev-parse", "HEAD", folder=source.parent)


def _git(*arguments: str, folder: Path) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
