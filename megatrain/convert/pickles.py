"""Other programs' pickles, which may hold code. They are opened only where the user trusts them, and even then by
unpicklers that know the few classes that such files need, as long as those suffice."""

import pickle
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megatrain.convert.checksums import require_checksums
from megatrain.convert.errors import ConversionError


def require_trust(path: Path, trusted: bool) -> None:
    """Refuses to open a pickle that nobody vouches for.

    Raises:
        ConversionError: with the cure.
    """
    if not trusted:
        raise ConversionError(
            f"{path} is a pickle, which can run any code when it is opened: --trust-pickle opens it all the same"
        )


class KnownClasses(pickle.Unpickler):
    """Unpickles objects of ``classes`` (by 'module.name') and nothing else.

    Raises:
        pickle.UnpicklingError: anything else is asked for.
    """

    def __init__(self, file: BinaryIO, classes: Mapping[str, Any]):
        super().__init__(file)
        self._classes = classes

    def find_class(self, module: str, name: str) -> Any:
        """The class, if it is known."""
        if f"{module}.{name}" not in self._classes:
            raise pickle.UnpicklingError(f"{module}.{name} is not known here")
        return self._classes[f"{module}.{name}"]


class StandIn:
    """Takes the place of a class of another program whose objects are not looked into."""

    def __init__(self, *values: Any, **named: Any):
        self.values, self.named = values, named

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def load_trusted(path: Path, stand_ins: Mapping[str, Any], say: Callable[[str], None] = print) -> Any:
    """A file of ``torch.save``, its tensors left on disk until they are looked at.

    Opened as weights only, with stand-ins for the other program's classes; fully, and said so, only where the file
    holds more than that.

    Raises:
        ConversionError: the file is damaged.
    """
    require_checksums(path)
    known = [(stand_in, name) for name, stand_in in stand_ins.items()]
    try:
        with torch.serialization.safe_globals(known):  # type: ignore[arg-type]
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        say(f"{path.name} holds more than numbers ({str(error).splitlines()[0][:100]}): opened as a full pickle")
    except (RuntimeError, OSError, EOFError, ValueError) as error:
        raise ConversionError(f"{path}: {error}") from error
    try:
        return torch.load(path, map_location="cpu", weights_only=False, mmap=True)
    except Exception as error:  # a full pickle runs whatever code it names
        raise ConversionError(f"{path} can't be opened: {type(error).__name__}: {error!s:.300}") from error


def stand_in(name: str) -> type:
    """A class of its own for a name, so that two are not taken for one another."""
    return types.new_class(name.rpartition(".")[2], (StandIn,))
