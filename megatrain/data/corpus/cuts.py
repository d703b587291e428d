"""Where a long text may be cut so that its pieces have the tokens of the whole: nowhere else is it cut.

A cut stands after a letter or a digit and before white space or punctuation. Three things are shown of a tokenizer:

- its normalizer changes both sides as if the other were not there;
- its pre-tokenizer ends a word there whatever stands around, or no entry of the vocabulary holds the two characters
  side by side, so that no merge and no piece reaches over the cut;
- no added token does.

What a tokenizer does at the start of a text (a space in front, spaces taken away) is kept from a piece that goes on by
encoding it after the one character that stands before it, and leaving that one's tokens out.
"""

import functools
import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

from megatrain.data.corpus.split_patterns import ENDING_WORDS

_WINDOW = 1 << 14  # characters that are looked at together
_CHECKED = 200  # characters on each side of a cut that are encoded, cut and whole
_SPACES = " \t\r\n"
# Joins letters into one word in some pre-tokenizers; "_" is left out by its category.
_APOSTROPHES = "'’＇"
_LAST_PUNCTUATION = 0x20000  # the planes above it hold none (Unicode 16)
_DOT_REPH = "\u0d4e"  # the one letter below U+10000 that Unicode joins with whatever follows

_LOCAL_NORMALIZERS = {
    *("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Strip", "Prepend", "Nmt"),
    *("BertNormalizer", "Precompiled"),
}
_NEUTRAL_SPLITS = {
    *("Digits", "UnicodeScripts", "CharDelimiterSplit", "Punctuation", "WhitespaceSplit", "ByteLevel", "Metaspace"),
}

Ids = Sequence[int]


@functools.cache
def _places() -> re.Pattern[str]:
    """Matches the character after a possible cut."""
    punctuation = "".join(
        letter
        for letter in map(chr, range(_LAST_PUNCTUATION))
        if unicodedata.category(letter) in ("Po", "Ps", "Pe", "Pd", "Pi", "Pf") and letter not in _APOSTROPHES
    )
    return re.compile(rf"(?<=[^\W_])[{_SPACES}{re.escape(punctuation)}]")


class Cutter:
    """Finds cuts that one tokenizer does not see.

    Args:
        tokenizer_json: the content of its file.
        eod: its end-of-document token, which need not be among the file's added tokens.
        normalize: its normalizer.
        encode: a text to its ids, without special tokens.
    """

    def __init__(self, tokenizer_json: bytes, eod: str, normalize: Callable[[str], str], encode: Callable[[str], Ids]):
        self._json = tokenizer_json
        self._eod = eod
        self._normalize = normalize
        self._encode = encode
        self._shown: dict[str, bool] = {}

    def find(self, text: str, begin: int) -> int:
        """The first cut in ``text`` at or after character ``begin`` (at least 1); -1: there is none."""
        for match in _places().finditer(text, begin) if self._content else ():
            at = match.start()
            pair = text[at - 1 : at + 1]
            if pair not in self._shown:
                self._shown[pair] = self._is_shown(*pair)
            if self._shown[pair] and self._holds(text, at):
                return at
            if not self._content:
                break
        return -1

    def find_in_bytes(self, content: bytes, begin: int) -> int:
        """The same in UTF-8: the byte at which to cut. Bytes that are no UTF-8 are never beside a cut."""
        while begin < len(content):
            first = max(0, begin - 4 * _CHECKED)
            window = content[first : begin + _WINDOW].decode(errors="surrogateescape")
            skipped = len(content[first:begin].decode(errors="surrogateescape"))
            at = self.find(window, max(1, skipped))
            if at >= 0:
                return first + len(window[:at].encode(errors="surrogateescape"))
            begin += _WINDOW - 8  # a character that the window cut in two is seen whole in the next one
        return -1

    def rest(self, before: str, piece: str) -> Ids:
        """Ids of a piece that goes on after the character ``before``.

        Raises:
            ValueError: the two can't be told apart.
        """
        context = list(self._encode(before))
        ids = self._encode(before + piece)
        if list(ids[: len(context)]) != context:
            raise ValueError(f"{before!r} has other tokens before {piece[:20]!r}")
        return ids[len(context) :]

    @functools.cached_property
    def _content(self) -> dict[str, Any] | None:
        """The tokenizer's file; None: nothing is shown of this tokenizer."""
        content: dict[str, Any] = json.loads(self._json)
        normalizers = _steps(content.get("normalizer"), "normalizers")
        splits = _steps(content.get("pre_tokenizer"), "pretokenizers")
        local = all(map(_is_local, normalizers)) and all(_ends_words(step) or _is_neutral(step) for step in splits)
        return content if local and not content["model"].get("dropout") else None

    @functools.cached_property
    def _splits(self) -> list[dict[str, Any]]:
        assert self._content is not None
        return _steps(self._content.get("pre_tokenizer"), "pretokenizers")

    @functools.cached_property
    def _added(self) -> list[dict[str, Any]]:
        assert self._content is not None
        return [*(self._content.get("added_tokens") or ()), {"content": self._eod}]

    @functools.cached_property
    def _neighbours(self) -> frozenset[str] | None:
        """Pairs of characters that some entry of the vocabulary holds side by side; None: the model sees more."""
        assert self._content is not None
        model = self._content["model"]
        kind = model.get("type") or ("BPE" if "merges" in model else "")
        position = ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
        if kind not in ("BPE", "Unigram") or any(model.get(key) for key in position):
            return None
        pieces = model["vocab"] if kind == "BPE" else [piece for piece, _ in model["vocab"]]
        return frozenset(piece[at : at + 2] for piece in pieces for at in range(len(piece) - 1))

    @functools.cached_property
    def _letters(self) -> frozenset[str]:
        """Characters that are entries of the vocabulary: runs of others may become one unknown token."""
        assert self._content is not None
        vocab = self._content["model"]["vocab"]
        pieces = vocab if isinstance(vocab, dict) else [piece for piece, _ in vocab]
        return frozenset(piece for piece in pieces if len(piece) == 1)

    def _is_shown(self, before: str, after: str) -> bool:
        if after not in _SPACES and not before.isalpha():
            return False  # "1,000" is one number to some
        plain = unicodedata.normalize("NFKC", before)[-1]
        if ord(before) > 0xFFFF or before == _DOT_REPH or not plain.isalnum():
            return False
        if any(_reaches(token, before + after) for token in self._added):
            return False
        left, whole = self._normalize(before), self._normalize(before + after + "a")
        if not left or len(whole) <= len(left) or not whole.startswith(left) or whole[len(left)].isalnum():
            return False
        first, second = left[-1], whole[len(left)]
        for step in self._splits:
            if step["type"] == "Metaspace" and second == " ":
                second = step["replacement"]
            if _ends_words(step) or _ends_word_before(step, after, second):
                return True
        return self._is_no_pair(first, second)

    def _is_no_pair(self, first: str, second: str) -> bool:
        """Whether no merge and no piece can hold both."""
        if self._neighbours is None or any(step["type"] == "ByteLevel" for step in self._splits):
            return False  # ByteLevel writes bytes, not characters
        return first + second not in self._neighbours and bool(self._letters & {first, second})

    def _holds(self, text: str, at: int) -> bool:
        """Whether a cut at ``at`` is as it was shown to be, on the text around it. If not, no more cuts are made."""
        left, right = text[max(0, at - _CHECKED) : at], text[at : at + _CHECKED]
        if any("\ud800" <= letter <= "\udfff" for letter in left + right):  # broken bytes
            return False
        try:
            same = list(self._encode(left + right)) == [*self._encode(left), *self.rest(left[-1], right)]
        except ValueError:
            same = False
        if not same:
            self._content = None
        return same


def _steps(part: dict[str, Any] | None, list_key: str) -> list[dict[str, Any]]:
    """The members of a normalizer or pre-tokenizer, in order."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for member in part[list_key] for step in _steps(member, list_key)]
    return [part]


def _is_local(normalizer: dict[str, Any]) -> bool:
    if normalizer["type"] != "Replace":
        return normalizer["type"] in _LOCAL_NORMALIZERS
    pattern = normalizer["pattern"]
    if "Regex" in pattern:
        return pattern["Regex"] in (" {2,}", r"\s+", r"\s{2,}")
    return not any(letter.isalnum() for letter in pattern["String"])


def _ends_words(step: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer ends a word at every place that is looked at, whatever stands around it."""
    if step["type"] == "ByteLevel":
        return bool(step.get("use_regex", True))
    if step["type"] == "Split" and step["pattern"].get("Regex") in ENDING_WORDS:
        return (step["behavior"], bool(step.get("invert"))) in (("Isolated", False), ("Removed", True))
    return step["type"] in ("BertPreTokenizer", "Whitespace")


def _is_neutral(step: dict[str, Any]) -> bool:
    """Whether it looks at no more than single characters, or pairs."""
    if step["type"] == "Split":
        return len(step["pattern"].get("String", "")) == 1
    return step["type"] in _NEUTRAL_SPLITS


def _ends_word_before(step: dict[str, Any], after: str, normalized: str) -> bool:
    """Whether it ends a word before this character."""
    if step["type"] == "Metaspace":
        return bool(step.get("split", True)) and normalized == step["replacement"]
    if step["type"] == "Punctuation":
        return step.get("behavior", "Isolated") == "Isolated" and after not in _SPACES
    return step["type"] == "WhitespaceSplit" and after in _SPACES


def _reaches(token: dict[str, Any], pair: str) -> bool:
    """Whether an added token may cover both characters of a cut."""
    content, wanted = (unicodedata.normalize("NFKC", text).casefold() for text in (token["content"], pair))
    return wanted in content or (bool(token.get("rstrip")) and content.endswith(wanted[0]))
