"""Documents -> token ids, by ``tokenizers`` or, where it is installed and gives the same, ``gigatoken``."""

import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from megatrain.config.extras import missing
from megatrain.data.corpus.chunks import MAX_PIECE_BYTES, PIECE_BYTES, Chunk, no_cut_within
from megatrain.data.corpus.cuts import Cutter
from megatrain.data.corpus.documents import BadPolicy, Document, EmptyPolicy, RecordReader
from megatrain.data.corpus.tokenizer_files import load_tokenizer
from megatrain.data.errors import DataError
from megatrain.data.shards.format import token_dtype

Backend = Literal["auto", "tokenizers", "gigatoken"]
_USUAL_EODS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
_CHECKED_FIRST = 1 << 16  # characters of the first documents that gigatoken is compared on
_CHECKED_LATER = 1 << 14  # and of one in sixteen of the later chunks
_HELD_OUT_BYTES = 1 << 16


class BackendMismatch(DataError):
    """gigatoken gives other ids than tokenizers."""


@dataclass(frozen=True)
class EncoderSpec:
    """What an encoder is made from; every process makes its own, once."""

    tokenizer: Path
    tokenizer_sha256: str
    eod: str | None
    bos: str | None
    backend: Backend
    bad: BadPolicy
    empty: EmptyPolicy
    validation_share: float


class Encoded(NamedTuple):
    """The documents of a chunk.

    ``ids`` [tokens]: in the type of the shards; ``lengths`` [documents]: tokens of each, with its first and its
    end-of-document token; ``held_out`` [documents]; ``problems``: bad records, as "origin: reason"; ``text_bytes``: of
    the documents in UTF-8.
    """

    ids: NDArray[np.integer]
    lengths: NDArray[np.int32]
    held_out: NDArray[np.bool_]
    problems: list[str]
    text_bytes: int


class Encoder:
    """Texts -> token ids. Special tokens that a text spells stay text.

    Args:
        tokenizer_json: content of a tokenizer.json.
        eod: the end-of-document token; None: the first of the usual ones that the tokenizer has.
        bos: the token that begins each document; None: none. ``encode`` does not add it.
    Raises:
        DataError: no tokenizer.json, or it has no such token; a backend that is not installed or can't read it.
    """

    def __init__(
        self,
        tokenizer_json: bytes,
        eod: str | None = None,
        backend: Backend = "tokenizers",
        bos: str | None = None,
    ):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes use the cores
        try:
            self.tokenizer: Any = Tokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # the library raises this class itself
            raise DataError(f"the tokenizer is not a tokenizer.json: {error}") from error
        self.eod, self.eod_id = self._find_eod(eod)
        self.bos_id = None if bos is None else self._find_bos(bos)
        self.vocab_size = max(self.tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.dtype = token_dtype(self.vocab_size)
        # Files made for fine-tuning may cut and pad; and a "<|endoftext|>" in the text must stay text.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.add_special_tokens([self.eod])
        self.tokenizer.encode_special_tokens = True
        _split_literals(self.tokenizer)
        self._fast = None if backend == "tokenizers" else _gigatoken(tokenizer_json, self.eod, backend)
        normalizer = self.tokenizer.normalizer
        self.cutter = Cutter(
            tokenizer_json, self.eod, normalizer.normalize_str if normalizer else str, self._encode_for_cutter
        )

    @property
    def backend(self) -> str:
        """Name and version of what encodes."""
        name = "tokenizers" if self._fast is None else "gigatoken"
        return f"{name} {metadata.version(name)}"

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """Token ids [tokens] of each text; long ones are encoded in pieces.

        Raises:
            DataError: a long text without a place to cut.
        """
        if max(map(len, texts), default=0) <= PIECE_BYTES:
            return self._encode_whole(texts)
        return [self._encode_long(text) for text in texts]

    def encode_rest(self, before: str, piece: str) -> NDArray[np.integer]:
        """Token ids [tokens] of a piece that goes on after the character ``before``.

        Raises:
            DataError: the tokenizer takes the two together, which must not be at a cut.
        """
        try:
            return np.array(self.cutter.rest(before, piece), np.int32)
        except ValueError as error:
            raise DataError(f"this tokenizer can't encode a long text in pieces: {error}") from error

    def pieces(self, text: str) -> list[str]:
        """``text``, cut where its tokenizer surely ends a word.

        Raises:
            DataError: there is no such place for ``MAX_PIECE_BYTES``.
        """
        begin, found = 0, []
        while len(text) - begin > PIECE_BYTES:
            cut = self.cutter.find(text, begin + PIECE_BYTES)
            end = len(text) if cut < 0 else cut
            found.append(text[begin:end])
            if (num_bytes := len(found[-1].encode())) > MAX_PIECE_BYTES:
                raise DataError(f"the text {text[:40]!r}… has {no_cut_within(num_bytes)}")
            begin = end
        return [*found, text[begin:]] if begin < len(text) else found

    def check(self, texts: Iterable[str], num_characters: int) -> None:
        """Compares gigatoken's ids with those of tokenizers on about so many characters.

        Raises:
            BackendMismatch: they differ.
        """
        if self._fast is None:
            return
        for text in texts:
            text = text[:num_characters]
            (expected,) = (
                encoding.ids for encoding in self.tokenizer.encode_batch_fast([text], add_special_tokens=False)
            )
            if (found := self._fast.encode(text).tolist()) != expected:
                at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), -1)
                raise BackendMismatch(
                    f"gigatoken gives other tokens than tokenizers (from token {at} of {text[:60]!r}…): "
                    "use --backend tokenizers"
                )
            num_characters -= len(text)
            if num_characters <= 0:
                return

    def _encode_whole(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        if self._fast is not None:
            return [self._fast.encode(text) for text in texts]
        encodings = self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def _encode_long(self, text: str) -> NDArray[np.integer]:
        first, *others = self.pieces(text)
        (ids,) = self._encode_whole([first])
        parts, before = [ids], first[-1]
        for piece in others:
            parts.append(self.encode_rest(before, piece))
            before = piece[-1]
        return np.concatenate(parts)

    def _encode_for_cutter(self, text: str) -> list[int]:
        (ids,) = self._encode_whole([text])
        found: list[int] = ids.tolist()
        return found

    def _find_bos(self, bos: str) -> int:
        number: int | None = self.tokenizer.token_to_id(bos)
        if number is None:
            added = [token.content for token in self.tokenizer.get_added_tokens_decoder().values()]
            raise DataError(f"the tokenizer has no token {bos!r}: name one of {added} by --bos")
        if number == self.eod_id:
            raise DataError(f"--bos is {bos!r}, the end-of-document token, which stands between documents already")
        return number

    def _find_eod(self, eod: str | None) -> tuple[str, int]:
        for token in (eod,) if eod is not None else _USUAL_EODS:
            if (number := self.tokenizer.token_to_id(token)) is not None:
                return token, number
        added = [token.content for token in self.tokenizer.get_added_tokens_decoder().values()]
        missing = repr(eod) if eod is not None else "that usually ends documents"
        raise DataError(f"the tokenizer has no token {missing}: name its end-of-document token by --eod, of {added}")


def encode_chunk(spec: EncoderSpec, chunk: Chunk) -> Encoded:
    """The work of one process: takes the documents out of a chunk and encodes them.

    Raises:
        DataError: a bad record under "fail", or a text that became the end-of-document token.
    """
    encoder = encoder_of(spec)
    reader = RecordReader(spec.bad, spec.empty)
    documents = reader.read(chunk)
    texts = [document.text for document in documents]
    _check_sample(encoder, chunk, texts)
    arrays = encoder.encode(texts) if chunk.begins else [encoder.encode_rest(chunk.before, text) for text in texts]
    bos = np.array([encoder.bos_id] if chunk.begins and encoder.bos_id is not None else [], np.int32)
    eod = np.array([encoder.eod_id] if chunk.ends else [], np.int32)
    flat = itertools.chain.from_iterable((bos, ids, eod) for ids in arrays)
    ids = np.concatenate([np.empty(0, np.int32), *flat], dtype=encoder.dtype, casting="unsafe")
    if np.count_nonzero(ids == encoder.eod_id) != len(eod) * len(arrays):
        _refuse_eod(encoder, documents, arrays)
    lengths = np.array([len(bos) + len(array) + len(eod) for array in arrays], np.int32)
    share = spec.validation_share
    held_out = np.array([share > 0 and is_held_out(text, share) for text in texts], bool)
    return Encoded(ids, lengths, held_out, reader.problems, sum(len(text.encode()) for text in texts))


@functools.lru_cache(maxsize=1)
def encoder_of(spec: EncoderSpec) -> Encoder:
    """This process's encoder.

    Raises:
        DataError: the tokenizer is another than the one whose digest is expected.
    """
    tokenizer_json = load_tokenizer(spec.tokenizer)
    if hashlib.sha256(tokenizer_json).hexdigest() != spec.tokenizer_sha256:
        raise DataError(f"{spec.tokenizer} has changed since the start: start again")
    return Encoder(tokenizer_json, spec.eod, spec.backend, spec.bos)


def is_held_out(text: str, share: float) -> bool:
    """Whether a document belongs to the validation set: by its first 64 KiB alone, so copies of it stay together."""
    begin = text[:_HELD_OUT_BYTES].encode()[:_HELD_OUT_BYTES]
    return int.from_bytes(hashlib.blake2b(begin, digest_size=8).digest(), "little") < share * 2**64


def _check_sample(encoder: Encoder, chunk: Chunk, texts: Sequence[str]) -> None:
    if chunk.number == 0:
        encoder.check(texts, _CHECKED_FIRST)
    elif texts and (number := hashlib.blake2b(b"%d" % chunk.number, digest_size=4).digest())[0] < 16:
        encoder.check(texts[int.from_bytes(number[1:]) % len(texts) :], _CHECKED_LATER)


def _refuse_eod(encoder: Encoder, documents: Sequence[Document], arrays: Sequence[NDArray[np.integer]]) -> None:
    for document, ids in zip(documents, arrays, strict=True):
        if (ids == encoder.eod_id).any():
            raise DataError(f"{document.origin}: ordinary text became the end-of-document token: choose another --eod")


def _split_literals(tokenizer: Any) -> None:
    """Cuts the names of special tokens in a text in two, for models that would find them in their vocabulary.

    A BPE spells them by its merges, which don't lead there; Unigram, WordPiece and word models look words up.
    """
    if isinstance(tokenizer.model, models.BPE):
        return
    names = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
    patterns = [f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names if len(name) > 1]
    if tokenizer.token_to_id("<0x00>") is not None:  # pieces for bytes
        patterns.append("<(?=0x[0-9A-F]{2}>)")
    split = pre_tokenizers.Split(Regex("|".join(patterns)), "isolated")
    before = tokenizer.pre_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([before, split]) if before else split


def _without_specials(tokenizer_json: str, eod: str) -> str:
    """A tokenizer.json without its special tokens: one that gigatoken does not know is text to it.

    Parses their list only; the vocabulary, most of the file, would take longer than gigatoken does to load it.
    """
    for key in re.finditer(r'"added_tokens"\s*:\s*', tokenizer_json):
        tokens, end = json.JSONDecoder().raw_decode(tokenizer_json, key.end())
        if isinstance(tokens, list):  # not the number of a token of this name
            kept = [token for token in tokens if not token.get("special") and token["content"] != eod]
            return f"{tokenizer_json[: key.end()]}{json.dumps(kept)}{tokenizer_json[end:]}"
    return tokenizer_json


def _gigatoken(tokenizer_json: bytes, eod: str, backend: Backend) -> Any:
    """gigatoken's tokenizer; None where it is not installed or can't take this one, and need not."""
    try:
        from gigatoken.gigatoken_rs import load_hf_json

        return load_hf_json(_without_specials(tokenizer_json.decode(), eod))
    except Exception as error:  # not installed, or whatever its parser raises
        if backend == "auto":
            return None
        if isinstance(error, ImportError):
            raise DataError(missing("gigatoken", "--backend gigatoken", error)) from error
        reason = str(error).splitlines()[0]
        raise DataError(f"--backend gigatoken: {reason}. --backend tokenizers takes every tokenizer") from error
