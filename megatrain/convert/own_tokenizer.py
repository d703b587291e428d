"""Which tokenizer belongs to a model that is converted, and whether one that is given does."""

from pathlib import Path

from megatrain.checkpoint.store.tokenizer_file import MAX_BYTES, CarriedTokenizer
from megatrain.convert.errors import ConversionError
from megatrain.convert.huggingface.model import HuggingFaceReader
from megatrain.convert.huggingface.tokenizer import CONFIG, TOKENIZER, TOKENIZER_FILES, copy_files, load, special_ids
from megatrain.convert.native import NativeReader
from megatrain.convert.table import Reader
from megatrain.spec.derive import num_tokens

EXTRAS = "huggingface"
"""Folder beside an imported checkpoint that keeps config, tokenizer and generation config for the way back."""
_USUAL_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


def tokenizer_file(reader: Reader, given: Path | None) -> Path | None:
    """The ``tokenizer.json`` that was given or lies beside the model, or in it."""
    if given is not None:
        file = given / TOKENIZER if given.is_dir() else given
        return file if file.is_file() else None
    beside = [place / TOKENIZER for place in (reader.path, reader.path / EXTRAS, reader.path.parent / EXTRAS)]
    return next((file for file in beside if file.is_file()), None)


def keep_extras(reader: Reader, given: Path | None, target: Path) -> CarriedTokenizer | None:
    """Keeps all that a Hugging Face model has beside its weights; returns what its checkpoint carries."""
    eod_id = None
    if isinstance(reader, HuggingFaceReader):
        ends = special_ids(reader.path, num_tokens(reader.model))["eos_token_id"]
        copy_files(reader.path, target / EXTRAS, CONFIG)
        eod_id = ends[0] if isinstance(ends, list) else ends
    file = tokenizer_file(reader, given)
    if file is None or file.stat().st_size > MAX_BYTES:
        return None
    content = file.read_bytes()
    load(content, file)
    return CarriedTokenizer(content, eod_id)


def extras_for(reader: Reader, given: Path | None) -> tuple[Path | CarriedTokenizer | None, int | None]:
    """(what a Hugging Face folder gets beside the weights, the end-of-document id).

    Raises:
        ConversionError: what was given is of another model.
    """
    own = reader.tokenizer if isinstance(reader, NativeReader) else None
    if given is not None:
        require_own(reader, given)
        if given.is_dir() and not any((given / name).is_file() for name in TOKENIZER_FILES):
            raise ConversionError(f"{given} holds no tokenizer")
    beside = reader.path.parent / EXTRAS
    found = beside if any((beside / name).is_file() for name in TOKENIZER_FILES) else own
    extras = given or found or (beside if beside.is_dir() else None)
    eod_id = None if own is None else own.eod_id
    if eod_id is None and extras is not None and not (isinstance(extras, Path) and extras.is_dir()):
        eod_id = _usual_end(extras)
    return extras, eod_id


def _usual_end(extras: Path | CarriedTokenizer) -> int | None:
    """The end-of-document token of a lone tokenizer.json, of those that are usual."""
    content = extras.content if isinstance(extras, CarriedTokenizer) else extras.read_bytes()
    numbers = map(load(content, extras).token_to_id, _USUAL_ENDS)
    return next((number for number in numbers if number is not None), None)


def require_own(reader: Reader, given: Path) -> None:
    """Checks that a tokenizer is that of the model, as far as its checkpoint tells.

    Raises:
        ConversionError: it is another, or has tokens that the model has no rows for.
    """
    file = tokenizer_file(reader, given)
    if file is None:
        return
    content = file.read_bytes()
    found = load(content, file)
    vocabulary = found.get_vocab(with_added_tokens=True)
    if (last := max(vocabulary.values(), default=0)) >= num_tokens(reader.model):
        raise ConversionError(
            f"{file} has the token id {last}, the model only {num_tokens(reader.model)} tokens: it is another's"
        )
    if not isinstance(reader, NativeReader):
        return
    own, digest = reader.tokenizer, CarriedTokenizer(content, None).sha256
    if own is not None and own.sha256 != digest:
        same = load(own.content, reader.path / TOKENIZER).get_vocab(with_added_tokens=True) == vocabulary
        if not same:
            raise ConversionError(f"{file} is not the tokenizer of {reader.path}: its tokens have other ids")
    elif own is None and reader.digests and digest not in reader.digests:
        raise ConversionError(
            f"{file} (SHA-256 {digest[:12]}…) is not the tokenizer of the data that {reader.path} was trained on "
            f"({', '.join(f'{one[:12]}…' for one in sorted(reader.digests))})"
        )
