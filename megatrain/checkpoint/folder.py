"""The folder of a run's checkpoints: names, what counts as committed, and how one takes its place atomically.

    step-00001000/            committed: it holds manifest.json
    .step-00001000.partial/   being written, or the stump of a save that was killed
    .step-00001000.replaced/  the older save of a step while the newer one takes its name
    .step-00001000.removed/   being deleted
    latest                    a hint for people: the name of the newest; nothing here reads it

Only one save at a time may write into a folder; ``lock`` sees to it.
"""

import re
import shutil
from contextlib import suppress
from pathlib import Path

from megatrain.checkpoint.errors import CheckpointError, explained
from megatrain.disk.durable import fsync_folder

MANIFEST = "manifest.json"
LATEST = "latest"
_STEP = re.compile(r"step-([0-9]{8,})")
_HIDDEN = re.compile(r"\.(step-[0-9]{8,})\.(partial|replaced|removed)")


def checkpoint_name(step: int) -> str:
    """``step-00001000`` for optimizer step 1000."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step that a folder name stands for, or ``None`` if it isn't a checkpoint's."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match and checkpoint_name(int(match[1])) == name else None


def list_checkpoints(folder: Path) -> list[Path]:
    """The committed checkpoints of ``folder``, lowest step first; empty if there is no such folder.

    Ordered by step, never by time. A kill while a step was being replaced can leave only ``.step-N.replaced``,
    which is then whole and stands for its step.

    Raises:
        CheckpointError: the folder can't be listed.
    """
    found: dict[int, Path] = {}
    for path in filter(is_committed, _entries(folder)):
        hidden = _HIDDEN.fullmatch(path.name)
        if (step := step_of(path.name)) is not None:
            found[step] = path
        elif hidden and hidden[2] == "replaced" and (step := step_of(hidden[1])) is not None:
            found.setdefault(step, path)
    return [found[step] for step in sorted(found)]


def checkpoint_remains(folder: Path) -> list[Path]:
    """Everything that shows that ``folder`` holds or held a committed checkpoint; stumps of a first save do not.

    Raises:
        CheckpointError: the folder can't be listed.
    """
    replaced = (
        path for path in _entries(folder) if (hidden := _HIDDEN.fullmatch(path.name)) and hidden[2] != "partial"
    )
    named = (path for path in _entries(folder) if path.name.startswith("step-") or path.name == LATEST)
    return sorted([*replaced, *named])


def newest_checkpoint(folder: Path) -> Path | None:
    """The committed checkpoint with the highest step, or ``None``. Stumps don't count; ``latest`` isn't asked.

    Raises:
        CheckpointError: the folder can't be listed.
    """
    return next(reversed(list_checkpoints(folder)), None)


def is_committed(path: Path) -> bool:
    """Whether the folder ``path`` holds a manifest, which is written after everything else is on disk."""
    return (path / MANIFEST).is_file()


def partial_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is written before it is committed."""
    return folder / f".{checkpoint_name(step)}.partial"


def clean_stumps(folder: Path) -> list[Path]:
    """Removes what killed saves and removals left, and puts a checkpoint back that was about to be replaced.

    Returns the removed paths, for the log. No save may be under way in ``folder``.
    """
    removed = []
    for path in _entries(folder):
        hidden = _HIDDEN.fullmatch(path.name)
        if hidden is None:
            continue
        final = folder / hidden[1]
        if hidden[2] == "replaced" and is_committed(path) and not is_committed(final):
            path.rename(final)
            fsync_folder(folder)
        else:
            shutil.rmtree(path)
            removed.append(path)
    return removed


def publish(folder: Path, step: int) -> Path:
    """Gives the complete partial folder of ``step`` its final name; an older save of the step goes only after that."""
    final = folder / checkpoint_name(step)
    replaced = folder / f".{final.name}.replaced"
    if final.exists():
        final.rename(replaced)
    partial_path(folder, step).rename(final)
    fsync_folder(folder)
    # The new checkpoint is on disk: what fails from here on costs space or a hint, and must not fail the save.
    with suppress(OSError):
        if replaced.exists():
            _remove(replaced, final.name)
    with suppress(OSError):
        hint = folder / f".{LATEST}.tmp"
        hint.write_text(f"{final.name}\n", encoding="utf-8")
        hint.replace(folder / LATEST)
    return final


def remove_checkpoint(path: Path) -> None:
    """Deletes a committed checkpoint. A kill in between leaves a stump, never a checkpoint with holes.

    Raises:
        CheckpointError: ``path`` isn't named like a checkpoint, or can't be removed.
    """
    if step_of(path.name) is None:
        raise CheckpointError(f"{path} is not named like a checkpoint: not removed")
    with explained(f"remove {path}"):
        _remove(path, path.name)


def require_free_space(folder: Path, num_bytes: int) -> None:
    """Checks, before a save, that the file system of ``folder`` (which need not exist yet) has ``num_bytes`` free.

    Raises:
        CheckpointError: it hasn't; names the path, the need and what is free.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    with explained(f"ask for the free space of {place}"):
        free = shutil.disk_usage(place).free
    if free < num_bytes:
        gib = 2.0**30
        raise CheckpointError(
            f"no room for a checkpoint in {folder}: it needs {num_bytes} bytes ({num_bytes / gib:.2f} GiB), "
            f"free are {free} bytes ({free / gib:.2f} GiB)"
        )


def _remove(path: Path, name: str) -> None:
    stump = path.with_name(f".{name}.removed")
    path.rename(stump)  # one step takes it out of sight; the deletion of many files isn't one step
    fsync_folder(path.parent)
    shutil.rmtree(stump)


def _entries(folder: Path) -> list[Path]:
    with explained(f"list {folder}"):
        return sorted(folder.iterdir(), key=lambda path: path.name, reverse=True) if folder.is_dir() else []
