"""The exceptions of the converter."""

from megatrain.checkpoint.store.errors import CheckpointError
from megatrain.errors import UNPROVED


class ConversionError(CheckpointError):
    """A model can't be converted. The text names what stands in the way, where, and the cure."""


class ProofFailed(ConversionError):
    """The converted model is not the model that it was made from."""

    exit_code = UNPROVED
