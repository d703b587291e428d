"""Mistakes of the user and of the world around: told in one message, without a traceback."""

from megatrain.checkpoint.store.errors import CheckpointError, StorageError
from megatrain.config.reading.problems import ConfigError
from megatrain.data.errors import DataError
from megatrain.engine.errors import LauncherError, LossScaleError, NonFiniteError, OperatorLockError
from megatrain.record.run_folder import RunFolderError

EXPECTED = (
    ConfigError,
    LauncherError,
    DataError,
    CheckpointError,
    RunFolderError,
    LossScaleError,
    NonFiniteError,
    OperatorLockError,
)

# exit codes; those of sysexits.h for an input/output error, and for what is to be tried again
MISTAKE, STORAGE_FAILED, STOPPED = 2, 74, 75


def exit_code(error: Exception) -> int:
    """By which a script tells what another start would meet again (2) from a disk that somebody must look at (74)."""
    return STORAGE_FAILED if isinstance(error, StorageError) else MISTAKE
