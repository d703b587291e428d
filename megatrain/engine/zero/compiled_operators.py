"""Operators of DeepSpeed that are compiled when a run first needs them, and the locks that killed compilations leave.

torch's builder makes a file ``lock``, keeps it open as long as it compiles, and removes it at the end. Whoever finds
one waits until it is gone, and where its maker was killed that is forever.
"""

import fcntl
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megatrain.config.schema import ResolvedRun
from megatrain.engine.errors import OperatorLockError

_PATIENCE = 900.0  # seconds of age after which nobody is believed to compile any more; it takes a minute or two
_LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "tmpfs", "overlay"}
"""File systems that no other host writes to."""


def free_locked_operators(config: ResolvedRun) -> None:
    """Makes sure that nobody waits for a compilation that was killed, before DeepSpeed compiles what ``config`` needs.

    Raises:
        OperatorLockError: a lock stays whose owner may be on another host.
    """
    from torch.utils.cpp_extension import _get_build_directory

    for name in compiled_operators(config):
        free_lock(Path(_get_build_directory(name, False)) / "lock")


def compiled_operators(config: ResolvedRun) -> list[str]:
    """Names of the operators that training by ``config`` compiles."""
    places = {config.offload.optimizer, config.offload.parameters}
    names = ["cpu_adam"] if config.optimizer.name == "cpu_adamw" else []
    names += ["pin_memory"] if places != {"none"} else []
    return names + (["async_io"] if "nvme" in places else [])


def announce_compilations(config: ResolvedRun, say: Callable[[str], None] = print) -> None:
    """Says which operators this host compiles now, as nothing else is heard of it for minutes."""
    from torch.utils.cpp_extension import _get_build_directory

    for name in compiled_operators(config):
        folder = Path(_get_build_directory(name, False))
        if not (folder / f"{name}.so").exists():
            say(f"compiling DeepSpeed's operator {name} into {folder}: takes some minutes, once on this host")


def free_lock(lock: Path, say: Callable[[str], None] = print, patience: float = _PATIENCE) -> None:
    """Removes ``lock`` if its owner is certainly gone: no process has it open, no other host or user made it.

    Where one can, waits until the lock is gone or ``patience`` seconds old.

    Raises:
        OperatorLockError: it stays.
    """
    with open(lock.parent / "megatrain.lock", "w", encoding="utf-8") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)  # of the ranks that find it, one removes it, and none a later one
        with suppress(FileNotFoundError):  # its owner removes it meanwhile
            if _is_open(lock):
                return
            if _file_system(lock) in _LOCAL and lock.stat().st_uid == os.geteuid():
                lock.unlink()
                say(f"removed {lock}, left by a compilation that was killed")
                return
    while lock.exists():
        with suppress(FileNotFoundError):
            if time.time() - lock.stat().st_mtime > patience:
                raise OperatorLockError(
                    f"{lock} says that an operator of DeepSpeed is being compiled, has done so for more than "
                    f"{patience / 60:.0f} minutes, and no process of this host does it: if none of another host does, "
                    "the compilation was killed; delete the file and start again"
                )
        time.sleep(min(1.0, patience))


def _is_open(path: Path) -> bool:
    """Whether a process of this host has the file open; those that may not be looked into are not asked."""
    wanted = path.stat()
    for descriptors in Path("/proc").glob("[0-9]*/fd"):
        try:
            for descriptor in os.scandir(descriptors):
                with suppress(FileNotFoundError):
                    if os.path.samestat(descriptor.stat(), wanted):
                        return True
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
    return False


def _file_system(path: Path) -> str | None:
    """Its type, from the table of mounts; None where the table does not know the device."""
    device = path.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines():
        fields, _, rest = line.partition(" - ")
        if fields.split()[2] == number:
            return rest.split()[0]
    return None
