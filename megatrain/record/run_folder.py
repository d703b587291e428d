"""The folder that everything of a run goes into."""

import errno
import json
import os
import platform
import socket
import subprocess
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Self

from megatrain import __version__
from megatrain.config.reading.problems import ConfigError, Problem
from megatrain.config.schema import ResolvedRun
from megatrain.config.show import to_yaml
from megatrain.disk.durable import write_durably
from megatrain.errors import ExpectedError

_PACKAGES = ("torch", "deepspeed", "megatron-core")


class RunFolderError(ExpectedError):
    """The run folder cannot be used; the text says why and what to do."""


def require_steps_left(config: ResolvedRun, step: int, path: Path) -> None:
    """
    Raises:
        ConfigError: the checkpoint ``path`` is of ``step``, which comes after the last one.
    """
    if step > config.train.steps:
        raise ConfigError(
            [
                Problem(
                    "train.steps",
                    config.train.steps,
                    f"is less than the {step} steps that were made already: {path}",
                    f"{step} or more",
                    "raise train.steps, give the run another name, or set checkpoint.resume: restart to begin again",
                )
            ]
        )


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
    def of(cls, config: ResolvedRun) -> Self:
        """The folder that ``config`` names."""
        return cls(Path(config.folder) / config.name)

    def make(self) -> None:
        """Makes the folder and those in it, before anything is written there.

        Raises:
            RunFolderError: something else has its name, or this user may not write there.
        """
        for place in (*reversed(self.checkpoints.parents), self.checkpoints):
            if os.path.lexists(place) and not place.is_dir():
                raise RunFolderError(
                    f"the run folder {self.path.absolute()} cannot be made: {place} is not a folder. Move that away, "
                    "or set `name` or `folder` to another place"
                )
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.tensorboard.mkdir(exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from error
        if not os.access(self.checkpoints, os.W_OK | os.X_OK):
            raise self._unusable(PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.checkpoints)))

    def _unusable(self, error: OSError) -> RunFolderError:
        return RunFolderError(
            f"cannot write the run folder {self.path.absolute()}: {error.strerror} ({error.filename}). "
            "Set `folder` to a place that this user can write."
        )

    def prepare(self, config: ResolvedRun) -> None:
        """Makes the folder and records the resolved ``config`` and the versions. One process does it: rank 0.

        Raises:
            RunFolderError: it cannot be made or written.
        """
        self.make()
        try:
            if not self._id_file.exists():
                write_durably(self._id_file, (uuid.uuid4().hex + "\n").encode())
            write_durably(self.config, (to_yaml(config)).encode())
            write_durably(self.versions, (json.dumps(versions(), indent=2) + "\n").encode())
            with self.metrics.open("a"):
                pass  # it may be there from an earlier start, and belong to somebody else
        except OSError as error:
            raise self._unusable(error) from error

    @property
    def run_id(self) -> str:
        """Made once, by the first ``prepare``; every resumed start keeps it."""
        return self._id_file.read_text(encoding="utf-8").strip()


def versions() -> dict[str, str | None]:
    """Versions of the programs that take part, and host and time of this start."""
    return {
        "python": platform.python_version(),
        "megatrain": __version__,
        **{package: _version(package) for package in _PACKAGES},
        "git_commit": _git_commit(),
        "host": socket.gethostname(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def other_versions(saved: Mapping[str, str]) -> list[str]:
    """Each program whose version differs from the one that saved a checkpoint, with both."""
    here = versions()
    names = [name for name in ("python", "megatrain", *_PACKAGES) if name in saved and saved[name] != here[name]]
    return [f"{name} {saved[name]} then, {here[name]} now" for name in names]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
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
