"""Where a run goes on: at its newest whole checkpoint, and never silently from the start."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from megatrain.checkpoint.load import ResumeData, What, load_checkpoint
from megatrain.checkpoint.state import require_state
from megatrain.checkpoint.store.arrays import CheckpointReader
from megatrain.checkpoint.store.errors import CheckpointError, StorageError, UnfitError, explained
from megatrain.checkpoint.store.folder import (
    candidates,
    checkpoint_at,
    checkpoint_remains,
    list_checkpoints,
    move_aside,
)
from megatrain.engine.engine import Engine
from megatrain.engine.state import factors
from megatrain.spec.kinds import WEIGHT

Mode = Literal["auto", "never", "restart"]


@dataclass(frozen=True)
class Resumed:
    """``state``: of the checkpoint ``path``; ``skipped``: newer ones that are damaged or lack their manifest, and how.

    ``versions``: of the programs that saved it, by name; ``what``: how much of it was loaded; ``report``: the same in
    sentences, of a checkpoint of another run.
    """

    path: Path
    state: dict[str, Any]
    versions: dict[str, str]
    skipped: tuple[tuple[Path, str], ...] = ()
    what: What = "all"
    report: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """The step that the run stands at: 0 where only weights or optimizer were loaded."""
        return self.state["step"] if self.what == "all" else 0

    @property
    def tokens(self) -> int:
        """Read so far, as ``step``."""
        return self.state["tokens"] if self.what == "all" else 0


def resume(
    engine: Engine,
    folder: Path,
    resume_data: ResumeData,
    mode: Mode = "auto",
    load: Path | None = None,
    what: What = "all",
) -> Resumed | None:
    """Loads the newest whole checkpoint of ``folder``, else ``load``; None: the run starts fresh. Collective.

    Args:
        load: a checkpoint of another run, for a folder that has none; ``what`` says how much of it.
    Raises:
        UnfitError: the newest whole one is of another model or data.
        StorageError: there are checkpoints, but none can be loaded.
        CheckpointError: only traces of some, or ``mode`` forbids them.
    """
    skipped: list[tuple[Path, str]] = []
    for path in _agreed(engine, lambda: _candidates(folder, mode)):
        try:
            versions = _agreed(engine, lambda path=path: _looked_at(path))  # type: ignore[misc]
            return Resumed(path, load_checkpoint(engine, path, resume_data), versions, tuple(skipped))
        except UnfitError:
            raise
        except CheckpointError as error:
            skipped.append((path, str(error)))
    if skipped:
        told = "\n  ".join(f"{path.name}: {problem}" for path, problem in skipped)
        raise StorageError(
            f"no checkpoint in {folder} can be loaded:\n  {told}\n"
            f"repair or replace one, or set checkpoint.resume: restart to begin again at step 0"
        )
    if load is None:
        return None
    load = _agreed(engine, lambda load=load: checkpoint_at(load))
    versions = _agreed(engine, lambda: _looked_at(load))
    state = load_checkpoint(engine, load, resume_data, what, grow=True)
    report = _agreed(engine, lambda: _report(engine, CheckpointReader(load), what))
    return Resumed(load, state, versions, what=what, report=report)


def _report(engine: Engine, reader: CheckpointReader, what: What) -> tuple[str, ...]:
    """What of another run's checkpoint was loaded, and what was not, in sentences."""
    saved = {kind: sum(1 for other, _ in reader.arrays if other == kind) for kind, _ in sorted(reader.arrays)}
    kept = {kind for moments in engine.moments.values() for kind in moments} | {kind for kind, _ in factors(engine)}
    loaded = [f"{saved.pop(WEIGHT)} weights"]
    if what != "weights":
        loaded += [f"{saved.pop(kind)} {kind}" for kind in sorted(kept & set(saved))]
        loaded.append(f"the optimizer's update count ({reader.state['optimizer_steps']})")
    if reader.state["router_biases"]:
        loaded.append("the routers' balance biases")
    if what == "all":
        loaded.append(f"step {reader.state['step']} and the place in the data")
    left = [f"{count} {kind}" for kind, count in saved.items()]
    left += ["the update count"] if what == "weights" else []
    left += [f"step {reader.state['step']} and the place in the data: both start anew"] if what != "all" else []
    sentences = [f"loaded {', '.join(loaded)}"]
    if left:
        sentences.append(f"not loaded: {', '.join(left)}")
    before, now = reader.state["model"]["vocab_size"], engine.config.model.vocab_size
    if now > before:
        sentences.append(f"rows {before} to {now - 1} of the vocabulary are not in it: they keep their initial weights")
    return tuple(sentences)


def _looked_at(path: Path) -> dict[str, str]:
    """The versions that saved a checkpoint, whose files are all there."""
    reader = CheckpointReader(path)
    reader.require_files()
    require_state(reader)
    return reader.versions


def set_aside(folder: Path) -> Path | None:
    """Moves all checkpoints and traces of some into a new folder beside them (``restart``); None: there were none.

    Raises:
        CheckpointError: they can't be moved.
    """
    remains = checkpoint_remains(folder)
    if not remains:
        return None
    with explained(f"set the checkpoints of {folder} aside"):
        return move_aside(folder, remains)


def _candidates(folder: Path, mode: Mode) -> list[Path]:
    """Newest first. Without any the folder must show no trace of one."""
    found, remains = list_checkpoints(folder), checkpoint_remains(folder)
    if remains and mode == "never":
        raise CheckpointError(
            f"checkpoint.resume is never, and {folder} holds {_listed(remains)}: choose another name for this run, "
            "or set checkpoint.resume to auto (go on) or restart (set them aside and begin again)"
        )
    if remains and not found:
        raise CheckpointError(
            f"{folder} holds {_listed(remains)}, but no checkpoint that was committed: this run would silently begin "
            "again. Put the checkpoints back, or set checkpoint.resume: restart to begin again at step 0"
        )
    return candidates(folder)


def _listed(paths: list[Path]) -> str:
    names = [path.name for path in paths]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _agreed(engine: Engine, action: Any) -> Any:
    """What ``action`` gives on rank 0, on every rank; or its error."""
    outcome: list[Any] = [None, None]
    if engine.mesh.rank == 0:
        try:
            outcome[0] = action()
        except CheckpointError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
