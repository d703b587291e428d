"""What Hugging Face's folders of weights share, of whatever kind the files are: one file, or shards with an index."""

import json
from collections.abc import Collection
from pathlib import Path

from megatrain.convert.errors import ConversionError


class ShardedFiles:
    """Which file of a folder holds which tensor."""

    folder: Path
    file_of: dict[str, str]

    def names(self) -> Collection[str]:
        """Names of all tensors."""
        return self.file_of.keys()

    def file_with(self, name: str) -> str:
        """The file beside the index that holds a tensor.

        Raises:
            ConversionError: none does.
        """
        if name not in self.file_of:
            raise ConversionError(f"{self.folder} has no tensor {name}")
        return self.file_of[name]


def read_index(path: Path) -> dict[str, str]:
    """Tensor -> the file beside the index that holds it.

    Raises:
        ConversionError: damaged, or it names files elsewhere.
    """
    try:
        file_of: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = set(file_of.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(f"{path} is damaged: {error!r}") from error
    if elsewhere := [name for name in names if not isinstance(name, str) or Path(name).name != name]:
        raise ConversionError(f"{path} names files outside its folder: {elsewhere[:3]}")
    return file_of
