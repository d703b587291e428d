"""``manifest.json``: what a data set holds. It is written last, so a folder without it is not a finished data set."""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from megatrain.data.errors import DataError
from megatrain.disk.durable import write_durably

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
FORMAT = "megatrain-tokens"
VERSION = 2


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
    """A whole data set.

    ``bad_records_sha256``: digest of the list of records that were left out, or "". ``made_from``: the settings and
    input digest that it is a function of. ``lineage``: inputs, command, versions and counts, for people.
    """

    tokenizer: str
    tokenizer_sha256: str
    vocab_size: int
    dtype: str
    eod_id: int
    shards: tuple[Shard, ...]
    bad_records_sha256: str
    made_from: dict[str, Any]
    lineage: dict[str, Any]

    @property
    def num_tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def num_documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    def write(self, folder: Path) -> None:
        """Writes the file durably; from then on the folder is a data set."""
        write_durably(folder / MANIFEST, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The file. Its last key is the digest of all that stands before."""
        body = json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=2)
        return _seal(body.removesuffix("\n}"))

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """
        Raises:
            DataError: there is no manifest, it is damaged, or of a newer version.
        """
        path = folder / MANIFEST
        try:
            raw = path.read_bytes()
            content = json.loads(raw)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise DataError(f"{path} is damaged ({error}): copy or write the data set again") from error
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise DataError(f"{path} is not the manifest of a data set: its format is not {FORMAT!r}")
        if (version := content.pop("version", None)) != VERSION:
            cure = "write the data set again" if isinstance(version, int) and version < VERSION else "use a newer one"
            raise DataError(f"{path} has version {version}, this megatrain reads {VERSION}: {cure}")
        content.pop("sha256", None)
        try:
            shards = tuple(_checked(Shard, shard) for shard in content.pop("shards"))
            manifest = _checked(Manifest, {**content, "shards": shards})
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is damaged ({error}): copy or write the data set again") from error
        if not shards:
            raise DataError(f"{path} lists no shards")
        if _seal(raw.rpartition(b",\n")[0].decode(errors="replace")) != raw:
            raise DataError(f"{path} was changed after it was written: its digest does not fit. Copy it again")
        return manifest


T = TypeVar("T", Shard, Manifest)


def _seal(body: str) -> bytes:
    return f'{body},\n  "sha256": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'.encode()


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
