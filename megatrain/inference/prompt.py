"""Text to tokens and back for a trained model, as its training data were made."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from megatrain.checkpoint.store.arrays import CheckpointReader
from megatrain.checkpoint.store.errors import CheckpointError
from megatrain.checkpoint.store.tokenizer_file import NAME, CarriedTokenizer, tokenizer_of
from megatrain.data.corpus.encode import Encoder
from megatrain.data.corpus.tokenizer_files import load_tokenizer
from megatrain.data.errors import DataError


@dataclass(frozen=True)
class Speech:
    """What a model's token ids mean. ``eod_id``: ends documents, None where nobody says what does."""

    encoder: Encoder
    eod_id: int | None

    @classmethod
    def of(cls, reader: CheckpointReader, given: Path | None) -> Self:
        """The tokenizer that a checkpoint carries, or one that is given and is the same.

        Raises:
            CheckpointError: there is none, or it is not the one that the model was trained with.
        """
        carried = tokenizer_of(reader)
        if given is not None:
            found = _given(reader, given, carried)
        elif carried is not None:
            found = carried
        else:
            raise CheckpointError(
                f"{reader.path} carries no tokenizer: --tokenizer names the tokenizer.json of its training data"
            )
        try:
            return cls(_encoder(found), found.eod_id)
        except DataError as error:
            raise CheckpointError(f"the tokenizer of {reader.path}: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Token ids of a document that begins so; an empty one begins as all do, or else behind the end of another.

        Raises:
            CheckpointError: the text is none, or nobody knows how documents end.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise CheckpointError(f"--prompt is not text in UTF-8: {error}") from error
        (ids,) = self.encoder.encode([text])
        begin = [] if self.encoder.bos_id is None else [self.encoder.bos_id]
        if len(ids) or begin:
            return [*begin, *(int(number) for number in ids)]
        if self.eod_id is None:
            raise CheckpointError(
                f"--prompt {text!r} is no tokens, and what ends documents is not known: give some text to go on with"
            )
        return [self.eod_id]

    def decode(self, prompt: list[int], new: list[int]) -> str:
        """What ``new`` tokens say behind ``prompt``: many tokens have a space only behind others."""
        tokenizer: Any = self.encoder.tokenizer
        before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *new])
        return whole.removeprefix(before) if whole.startswith(before) else tokenizer.decode(new)


def _given(reader: CheckpointReader, path: Path, carried: CarriedTokenizer | None) -> CarriedTokenizer:
    try:
        found = CarriedTokenizer(load_tokenizer(path), *((carried.eod_id, carried.bos) if carried else (None, None)))
    except DataError as error:
        raise CheckpointError(f"--tokenizer {path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"--tokenizer {path}: {error.strerror} (seen from {Path.cwd()})") from error
    told = reader.state.get("tokenizers")
    known = {one for one in told.values() if one} if isinstance(told, dict) else set()
    if carried is not None:
        known.add(carried.sha256)
    if known and found.sha256 not in known:
        cure = f"leave --tokenizer out: {reader.path / NAME} is the right one" if carried else "name the right one"
        raise CheckpointError(
            f"--tokenizer {path} (SHA-256 {found.sha256[:12]}…) is not the one that the model was trained with "
            f"({', '.join(f'{one[:12]}…' for one in sorted(known))}): {cure}"
        )
    return found


def _encoder(found: CarriedTokenizer) -> Encoder:
    """The encoder of the data tools, for the end-of-document token of these data.

    Raises:
        DataError: it can't be made.
    """
    from tokenizers import Tokenizer

    if found.eod_id is None:
        return Encoder(found.content, bos=found.bos)
    try:
        eod = Tokenizer.from_buffer(found.content).id_to_token(found.eod_id)
    except Exception as error:  # the library raises this class itself
        raise DataError(f"not a tokenizer.json: {error}") from error
    if eod is None:
        raise DataError(f"it has no token {found.eod_id}, which ends documents")
    return Encoder(found.content, eod, bos=found.bos)
