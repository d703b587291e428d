"""Any tokenizer file (SentencePiece, tiktoken, WordPiece) -> the content of a tokenizer.json."""

import base64
import binascii
import itertools
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.implementations import BertWordPieceTokenizer

from megatrain.data.corpus.sentencepiece_files import from_sentencepiece
from megatrain.data.corpus.split_patterns import CL100K, GPT2, O200K
from megatrain.data.errors import DataError

# name -> (pattern, {special token: id}); Llama 3's file has tiktoken's format and no name of its own
_TIKTOKEN: dict[str, tuple[str, dict[str, int]]] = {
    "gpt2": (GPT2, {"<|endoftext|>": 50256}),
    "r50k_base": (GPT2, {"<|endoftext|>": 50256}),
    "p50k_base": (GPT2, {"<|endoftext|>": 50256}),
    "cl100k_base": (CL100K, {"<|endoftext|>": 100257}),
    "o200k_base": (O200K, {"<|endoftext|>": 199999}),
    "llama3": (CL100K, {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001}),
}


def load_tokenizer(path: Path) -> bytes:
    """The tokenizer.json that stands in ``path``, or that says the same as it.

    Knows tokenizer.json and the folder of one, SentencePiece models (.model), tiktoken ranks (.tiktoken, or any
    name with lines of base64 and number) and WordPiece vocabularies (vocab.txt).

    Raises:
        DataError: none of these, or a kind of SentencePiece model that can't be expressed.
    """
    if path.is_dir():
        return load_tokenizer(_in_folder(path))
    if not path.exists():
        raise DataError(f"no tokenizer at {path}: --tokenizer is the path of a file. {_how_to_get(path)}")
    content = path.read_bytes()
    if not content.strip():
        raise DataError(f"{path} is empty: no tokenizer. {_how_to_get(path)}")
    if content.lstrip()[:1] == b"{":
        _check_json(path, content)
        return content
    if _looks_like_ranks(content):
        return _from_tiktoken(path, content)
    if path.suffix == ".txt":
        return _from_wordpiece(path)
    if path.suffix in (".model", ".spm") or content.startswith(b"\n"):
        return from_sentencepiece(path, content)
    raise DataError(f"{path} is no tokenizer.json, SentencePiece model, tiktoken file or WordPiece vocab.txt")


def _in_folder(folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer.model", "vocab.txt"):
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{folder} holds no tokenizer.json, tokenizer.model or vocab.txt. {_how_to_get(folder)}")


def _how_to_get(path: Path) -> str:
    """How a person gets a tokenizer; ``path`` may be the name under which one is published."""
    return (
        "data_tools/train_tokenizer.py makes one of your text; a published one is a tokenizer.json, which "
        f'"hf download REPOSITORY tokenizer.json --local-dir FOLDER" fetches ({path.name} may be such a name)'
    )


def _check_json(path: Path, content: bytes) -> None:
    try:
        found = json.loads(content)
    except ValueError as error:
        raise DataError(f"{path} is not a tokenizer.json: {error}") from error
    if "model" not in found:
        raise DataError(f"{path} is not a tokenizer.json: it holds {', '.join(list(found)[:5]) or 'nothing'}, no model")


def _from_wordpiece(path: Path) -> bytes:
    """BERT's: lower case unless tokenizer_config.json beside it or the vocabulary itself says otherwise."""
    words = path.read_text(encoding="utf-8").splitlines()
    if missing := {"[UNK]", "[CLS]", "[SEP]"}.difference(words):
        raise DataError(f"{path} is no WordPiece vocabulary: it has no {', '.join(sorted(missing))}")
    config = path.with_name("tokenizer_config.json")
    lower = all(word == word.lower() for word in words if not word.startswith("["))
    if config.is_file():
        lower = bool(json.loads(config.read_bytes()).get("do_lower_case", lower))
    made = BertWordPieceTokenizer({word: number for number, word in enumerate(words)}, lowercase=lower)
    return made.to_str(pretty=True).encode()


def _looks_like_ranks(content: bytes) -> bool:
    words = content[:4096].split(b"\n", 1)[0].split()
    try:
        return len(words) == 2 and words[1].isdigit() and bool(base64.b64decode(words[0], validate=True))
    except binascii.Error:
        return False


def _from_tiktoken(path: Path, content: bytes) -> bytes:
    lines = (line.split() for line in content.splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    name = path.name.split(".")[0]
    if name not in _TIKTOKEN:
        name = "llama3" if len(ranks) == 128_000 else name
    if name not in _TIKTOKEN:
        raise DataError(
            f"{path}: a tiktoken file doesn't say how text is split; name it after its encoding, one of "
            f"{', '.join(_TIKTOKEN)}"
        )
    pattern, specials = _TIKTOKEN[name]
    spell = _byte_letters()
    vocab = {"".join(spell[byte] for byte in token): rank for token, rank in ranks.items()}
    halves = (_halves(ranks, token) for token in ranks if len(token) > 1)
    merges = [tuple("".join(spell[byte] for byte in half) for half in pair) for pair in halves if pair]
    # tiktoken takes a word that is a token as it is, whether or not its merges lead there
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))  # type: ignore[arg-type]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return _with_specials(tokenizer, specials)


def _halves(ranks: dict[bytes, int], token: bytes) -> list[bytes]:
    """The two tokens whose merge gives ``token``: its bytes, merged by all lower ranks. Empty: no merges lead there."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [(ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
        rank, at = min(pairs)
        if rank >= ranks[token]:
            return []
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _byte_letters() -> dict[int, str]:
    """The letter by which byte-level tokenizers write each byte."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def _with_specials(tokenizer: Tokenizer, specials: dict[str, int]) -> bytes:
    """The tokenizer with special tokens of given ids, which its library numbers by itself only."""
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [
        {
            "id": number,
            "content": token,
            "special": True,
            **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
        }
        for token, number in specials.items()
    ]
    content["model"]["vocab"] |= specials
    return json.dumps(content, ensure_ascii=False, indent=1).encode()
