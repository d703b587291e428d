"""A Hugging Face model's tokenizer, generation config and special ids: kept at the import, given back at the export."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatrain.checkpoint.store.tokenizer_file import CarriedTokenizer
from megatrain.convert.errors import ConversionError

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"
SETTINGS = "tokenizer_config.json"
TOKENIZER_FILES = (
    TOKENIZER,
    SETTINGS,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
)
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# what transformers takes where a config.json of the family leaves them out
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"bos_token_id": 1, "eos_token_id": 2},
    "mixtral": {"bos_token_id": 1, "eos_token_id": 2},
    "gpt2": {"bos_token_id": 50256, "eos_token_id": 50256},
}
Ids = dict[str, Any]
"""By name: an id, several, or None."""


def copy_files(source: Path, target: Path, *more: str) -> list[str]:
    """Copies a model's tokenizer, generation config and ``more``; returns their names."""
    found = [name for name in (*TOKENIZER_FILES, GENERATION, *more) if (source / name).is_file()]
    if found:
        target.mkdir(parents=True, exist_ok=True)
    for name in found:
        shutil.copyfile(source / name, target / name)
    return found


def write_tokenizer(extras: Path | CarriedTokenizer, folder: Path, model_ids: Ids) -> None:
    """Puts a tokenizer into the folder of a model: all that lies in a folder, or what a tokenizer.json alone gives.

    Args:
        model_ids: of the model, by which a lone tokenizer.json finds its special tokens.
    Raises:
        ConversionError: a file is none.
    """
    if isinstance(extras, Path) and extras.is_dir():
        copy_files(extras, folder)
        return
    content = extras.content if isinstance(extras, CarriedTokenizer) else extras.read_bytes()
    (folder / TOKENIZER).write_bytes(content)
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    tokenizer = load(content, folder / TOKENIZER)
    for name, number in model_ids.items():
        first = number[0] if isinstance(number, list) else number
        if first is not None and (token := tokenizer.id_to_token(first)) is not None:
            settings[name.removesuffix("_id")] = token
    write_json(folder / SETTINGS, settings)


def write_generation(extras: Path | None, folder: Path, model_ids: Ids, eod_id: int | None) -> None:
    """``generation_config.json``: as it was where there is one, with the ids that it lacks and the data's end."""
    path = None if extras is None else extras / GENERATION
    given = read_json(path) if path is not None and path.is_file() else {"_from_model_config": True}
    known = {name: number for name, number in model_ids.items() if number is not None and given.get(name) is None}
    values = given | known
    if (ends := with_end(values.get("eos_token_id"), eod_id)) is not None:
        values["eos_token_id"] = ends
    write_json(folder / GENERATION, values)


def special_ids(folder: Path, num_tokens: int) -> Ids:
    """The ids that a folder tells, where nothing tells them None: of its config.json, or what transformers takes
    instead; of its generation config; of the tokens that its tokenizer's settings name.

    Raises:
        ConversionError: a file is damaged, or one of them is no id.
    """
    found: Ids = dict.fromkeys(IDS)
    for values in _told(folder, num_tokens):
        for name in IDS:
            if found[name] is None:
                found[name] = _checked(folder, name, values.get(name))
    return found


def with_end(ends: Any, eod_id: int | None) -> Any:
    """The ids that end a text, that of the training data among them."""
    if eod_id is None or ends == eod_id:
        return ends
    if ends is None:
        return eod_id
    several = ends if isinstance(ends, list) else [ends]
    return several if eod_id in several else [*several, eod_id]


def load(content: bytes, where: object) -> Any:
    """The tokenizer of a tokenizer.json.

    Raises:
        ConversionError: it is none; ``where`` names the file.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_buffer(content)
    except Exception as error:  # the library raises this class itself
        raise ConversionError(f"{where} is no tokenizer.json: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ConversionError: it is not there or none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConversionError(f"{path} is missing") from error
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path} holds no JSON object")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes an object, indented."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _told(folder: Path, num_tokens: int) -> Iterator[Mapping[str, Any]]:
    """What each file says, the first first."""
    if (folder / CONFIG).is_file():
        config = read_json(folder / CONFIG)
        taken = _DEFAULTS.get(str(config.get("model_type")), {})
        # an explicit null stays none
        yield config | {name: i for name, i in taken.items() if name not in config and i < num_tokens}
    if (folder / GENERATION).is_file():
        yield read_json(folder / GENERATION)
    if (folder / SETTINGS).is_file() and (folder / TOKENIZER).is_file():
        tokenizer = load((folder / TOKENIZER).read_bytes(), folder / TOKENIZER)
        settings = read_json(folder / SETTINGS)
        yield {name: _id_of(settings.get(name.removesuffix("_id")), tokenizer) for name in IDS}


def _id_of(token: Any, tokenizer: Any) -> int | None:
    text = token.get("content") if isinstance(token, dict) else token
    return tokenizer.token_to_id(text) if isinstance(text, str) else None


def _checked(folder: Path, name: str, value: Any) -> Any:
    several = value if isinstance(value, list) else [value]
    if value is not None and not all(type(one) is int and -1 <= one < 2**31 for one in several):
        raise ConversionError(f"{folder}: {name} = {value!r:.100} is no token id")
    return value or None if isinstance(value, list) else value
