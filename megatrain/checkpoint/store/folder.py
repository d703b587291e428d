"""The folder of a run's checkpoints: names, what counts as committed, and how one takes its place atomically.

    step-00001000/            committed: it holds manifest.json
    .step-00001000.partial/   being written, or the stump of a save that was killed
    .step-00001000.replaced/  the older save of a step while the newer one takes its name
    .step-00001000.removed/   being deleted
    set-aside-1-NAME          what was in the way of a save and is not surely worthless; nothing here reads it
    latest                    a hint for people: the name of the newest; nothing here reads it

Only one save at a time may write into a folder; ``lock`` sees to it.
"""

import errno
import os
import re
import shutil
import stat
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from megatrain.checkpoint.store.errors import CheckpointError, explained
from megatrain.checkpoint.store.manifest import TENSORS
from megatrain.disk.durable import fsync_folder, write_durably
from megatrain.disk.small import kind_of

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
    """Whether the folder ``path`` holds a manifest, which is written after everything else is on disk.

    Also where the manifest is no file, or the folder may not be entered: what can't be looked at is no stump.
    """
    try:
        os.lstat(path / MANIFEST)
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
    return True


def candidates(folder: Path) -> list[Path]:
    """All that is, or is named like, a checkpoint of ``folder``, highest step first: a manifest may have been lost.

    Raises:
        CheckpointError: the folder can't be listed.
    """
    found = {path.name: path for path in _entries(folder) if step_of(path.name) is not None}
    committed = {path.name.removeprefix(".").removesuffix(".replaced"): path for path in list_checkpoints(folder)}
    return [path for _, path in sorted({**found, **committed}.items(), key=lambda item: -(step_of(item[0]) or 0))]


def checkpoint_at(path: Path) -> Path:
    """The checkpoint that a person means: ``path`` itself, whatever its name, or the newest of a run there.

    A run is named by its folder or by its folder of checkpoints. A checkpoint may still turn out to be damaged.

    Raises:
        CheckpointError: there is nothing, no folder, or no checkpoint in it.
    """
    with explained(f"look at {path}"):
        if is_committed(path) or (path.is_dir() and (path / TENSORS).is_dir()):
            return path
        _require_folder(path)
        inner = path / "checkpoints"
        newest = newest_checkpoint(inner if inner.is_dir() else path)
    if newest is None:
        raise CheckpointError(f"{path} holds no checkpoint yet")
    return newest


def run_checkpoints(path: Path) -> Path:
    """The folder of checkpoints of a run, whichever of the two ``path`` names.

    Raises:
        CheckpointError: there is no such folder.
    """
    with explained(f"look at {path}"):
        _require_folder(path)
        return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def _require_folder(path: Path) -> None:
    if not os.path.lexists(path):
        raise CheckpointError(f"no such folder: {path}")
    if not path.is_dir():
        raise CheckpointError(f"{path} is {kind_of(os.lstat(path))}, not the folder of a checkpoint or a run")


def partial_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is written before it is committed."""
    return folder / f".{checkpoint_name(step)}.partial"


def clean_stumps(folder: Path, notes: list[str] | None = None) -> list[Path]:
    """Removes what killed saves and removals left, and puts a checkpoint back that was about to be replaced.

    What has such a name and is no folder was made by somebody else, and is set aside. Nothing stops a save here but
    what stands at its very place: the rest is only told. No save may be under way in ``folder``.

    Args:
        notes: is given what was set aside, and what could not be removed.
    Returns: the removed paths, for the log.
    """
    removed, told = [], [] if notes is None else notes
    for path in _entries(folder):
        hidden = _HIDDEN.fullmatch(path.name)
        if hidden is None:
            continue
        final = folder / hidden[1]
        try:
            if not _is_own_folder(path):
                told.append(_put_aside(folder, path))
            elif hidden[2] == "replaced" and is_committed(path) and not is_committed(final):
                if os.path.lexists(final):
                    told.append(_put_aside(folder, final))
                path.rename(final)
                fsync_folder(folder)
            else:
                shutil.rmtree(path)
                removed.append(path)
        except OSError as error:
            try:
                told.append(_put_aside(folder, path))
            except OSError:
                told.append(f"cannot clean {path} up: {error.strerror or error}")
    return removed


def publish(folder: Path, step: int, is_worthless: bool = True) -> str | None:
    """Gives the complete partial folder of ``step`` its final name; an older save of the step goes only after that.

    Args:
        is_worthless: what stands there now is another checkpoint of the step; else it is set aside, not deleted.
    Returns: what was set aside and where, for the log.
    """
    final = folder / checkpoint_name(step)
    replaced = folder / f".{final.name}.replaced"
    note = None
    if os.path.lexists(final):
        if is_worthless and _is_own_folder(final):
            final.rename(replaced)
        else:
            note = _put_aside(folder, final)
    partial_path(folder, step).rename(final)
    fsync_folder(folder)
    # The new checkpoint is on disk: what fails from here on costs space or a hint, and must not fail the save.
    with suppress(OSError):
        if replaced.exists():
            _remove(replaced, final.name)
    with suppress(OSError):
        write_durably(folder / LATEST, f"{final.name}\n".encode())
    return note


def move_aside(folder: Path, paths: Sequence[Path]) -> Path:
    """Moves ``paths``, all in ``folder``, into a new folder ``set-aside-1`` (or -2, …) in it, which is returned.

    Raises:
        OSError: they can't be moved.
    """
    place = _free_place(folder)
    place.mkdir()
    for path in paths:
        path.rename(place / path.name)
    fsync_folder(folder)
    return place


def _put_aside(folder: Path, path: Path) -> str:
    """Gives something in ``folder`` another name there: to move a folder elsewhere one must be allowed to enter it."""
    place = _free_place(folder, f"-{path.name.removeprefix('.')}")
    path.rename(place)
    fsync_folder(folder)
    return f"{path} was in the way and is no whole checkpoint: it is now {place}"


def _free_place(folder: Path, end: str = "") -> Path:
    number = 1
    while os.path.lexists(place := folder / f"set-aside-{number}{end}"):
        number += 1
    return place


def _is_own_folder(path: Path) -> bool:
    return stat.S_ISDIR(os.lstat(path).st_mode)


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
    while not os.path.exists(place):  # also where it may not be looked at
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
    if not _is_own_folder(path):
        path.unlink()  # a link: what it leads to is not ours to delete
        return
    path.rename(stump)  # one step takes it out of sight; the deletion of many files isn't one step
    fsync_folder(path.parent)
    shutil.rmtree(stump)


def _entries(folder: Path) -> list[Path]:
    with explained(f"list {folder}"):
        return sorted(folder.iterdir(), key=lambda path: path.name, reverse=True) if folder.is_dir() else []
