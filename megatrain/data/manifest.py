"""``manifest.json``: what a data set holds. It is written last, so a folder without it is not a finished data set."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from megatrain.data.durable import write_durably
from megatrain.data.errors import DataError

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
FORMAT = "megatrain-tokens"
VERSION = 1


@dataclass(frozen=True)
class Shard:
    """One .bin/.idx pair. ``max_id`` is its highest token id; the digests are SHA-256 in hexadecimal."""

    name: str
    documents: int
    tokens: int
    max_id: int
    bin_sha256: str
    idx_sha256: str


@dataclass(frozen=True)
class Manifest:
    """A whole data set. ``made_from``: the settings and input digest that it is a function of."""

    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    dtype: str
    eod_id: int
    shards: tuple[Shard, ...]
    made_from: dict[str, Any]

    @property
    def num_tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def num_documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    def write(self, folder: Path) -> None:
        """Writes the file durably; from then on the folder is a data set."""
        content = {"format": FORMAT, "version": VERSION, **asdict(self)}
        write_durably(folder / MANIFEST, (json.dumps(content, indent=2) + "\n").encode())

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """
        Raises:
            DataError: there is no manifest, it is damaged, or of a newer version.
        """
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_bytes())
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise DataError(f"{path} is damaged ({error}): copy or write the data set again") from error
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise DataError(f"{path} is not the manifest of a data set: its format is not {FORMAT!r}")
        if (version := content.pop("version", None)) != VERSION:
            raise DataError(f"{path} has version {version}, this megatrain reads {VERSION}: use one that reads both")
        try:
            shards = tuple(_checked(Shard, shard) for shard in content.pop("shards"))
            return _checked(Manifest, {**content, "shards": shards})
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is damaged ({error}): copy or write the data set again") from error


T = TypeVar("T", Shard, Manifest)


def digest_of(shard_digests: list[str]) -> str:
    """One digest for a data set, from the digests of its files in order."""
    return hashlib.sha256("\n".join(shard_digests).encode()).hexdigest()


def _checked(kind: type[T], content: dict[str, Any]) -> T:
    """``kind(**content)``, its numbers and texts being such."""
    made = kind(**content)
    for field in fields(made):
        value = getattr(made, field.name)
        if field.type in (int, str) and type(value) is not field.type:
            raise TypeError(f"{field.name} is {value!r}")
    return made
