"""The tokenizer that a checkpoint carries, so that its folder alone tells what its token ids mean.

step-00001000/tokenizer.json   as the data set holds it
manifest.json                  state.tokenizer: its SHA-256, the end-of-document id, the token that begins documents
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatrain.checkpoint.store.arrays import CheckpointReader
from megatrain.checkpoint.store.errors import CheckpointError, explained
from megatrain.checkpoint.store.tree import Tree
from megatrain.disk.durable import write_durably

NAME = "tokenizer.json"
MAX_BYTES = 2**26
"""The largest that is carried: 64 MiB, some ten times that of a vocabulary of 256 thousand tokens."""


@dataclass(frozen=True)
class CarriedTokenizer:
    """``content``: of the tokenizer.json; ``eod_id`` ends documents, None where nobody says so; ``bos`` begins them."""

    content: bytes
    eod_id: int | None
    bos: str | None = None

    @property
    def sha256(self) -> str:
        """The SHA-256 of the content, in hexadecimal."""
        return hashlib.sha256(self.content).hexdigest()

    def state(self) -> dict[str, Any]:
        """What the manifest says of it."""
        return {"sha256": self.sha256, "eod_id": self.eod_id, "bos": self.bos}

    def write(self, folder: Path) -> None:
        """Writes the file into the folder of a checkpoint that is being saved.

        Raises:
            CheckpointError: an error of the file system.
        """
        with explained(f"write {folder / NAME}"):
            write_durably(folder / NAME, self.content)


def tokenizer_to_carry(
    path: Path | None, sha256: str | None, eod_id: int | None, bos: str | None = None
) -> tuple[CarriedTokenizer | None, str]:
    """(what checkpoints will carry, or else why they carry none).

    Args:
        path: of the tokenizer.json; None: the data don't say.
        sha256: that it must have; None: any.
    """
    if path is None:
        return None, "the data sets name no tokenizer"
    try:
        if path.stat().st_size > MAX_BYTES:
            return None, f"{path} has more than {MAX_BYTES} bytes"
        content = path.read_bytes()
    except OSError as error:
        return None, f"{path} can't be read: {error.strerror}"
    found = CarriedTokenizer(content, eod_id, bos)
    if sha256 is not None and found.sha256 != sha256:
        return None, f"{path} is not the one that the data set was written with"
    return found, ""


def tokenizer_of(reader: CheckpointReader) -> CarriedTokenizer | None:
    """The tokenizer of a checkpoint; None where it carries none.

    Raises:
        CheckpointError: it should be there and isn't, or is damaged.
    """
    said = reader.state.get("tokenizer")
    if said is None:
        return None
    path = f"{reader.path}/{NAME}"
    known = isinstance(said, dict) and isinstance(said.get("eod_id"), int | None)
    if not known or not isinstance(said.get("bos"), str | None):
        raise CheckpointError(
            f"{reader.path}: the manifest's state.tokenizer is {said!r:.100}, which is no tokenizer's"
        )
    if not os.path.lexists(path):
        raise CheckpointError(f"{path} is missing, which belongs to the checkpoint: copy its folder again")
    with explained(f"read {path}"):
        found = CarriedTokenizer(Tree(reader.path).content(NAME, MAX_BYTES), said.get("eod_id"), said.get("bos"))
    if found.sha256 != said.get("sha256"):
        raise CheckpointError(f"{path} is damaged: it is not what was saved here")
    return found
