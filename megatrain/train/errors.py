"""Mistakes of the user and of the world around: told in one message, without a traceback."""

from megatrain.checkpoint.errors import CheckpointError
from megatrain.config.problems import ConfigError
from megatrain.data.errors import DataError
from megatrain.engine.errors import LossScaleError
from megatrain.train.run_folder import RunFolderError

EXPECTED = (ConfigError, DataError, CheckpointError, RunFolderError, LossScaleError)
