"""Rules that tell prose from what only looks like text, and the normalisation of its letters.

The rules are those of Gopher (Rae et al. 2021, arXiv:2112.11446, appendix A.1.1) with its thresholds, but for the
length, which is by characters so that short documents in any script can stay. Where a script has no spaces, each of its
letters counts as a word, and the length of words is that of the others.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

from megatrain.data.corpus.words import is_unspaced, num_letters, words_of

Form = Literal["NFC", "NFKC", "none"]

_BULLETS = ("-", "*", "•", "‣", "◦", "●", "·")
_ELLIPSES = ("...", "…")
_STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
# what ends a line or a page (Unicode 16, section 5.8), and the information separators
_LINE_END = re.compile("\r\n|[\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
# control characters but tab and newline, and marks that show nothing
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2060\ufeff]")


def normalize(text: str, form: Form = "NFC") -> str:
    """Unicode's normal form; "\\n" for every end of line; no control or invisible characters; no blanks before an end
    of line, and no more than two ends of line together."""
    if form != "none":
        text = unicodedata.normalize(form, text)
    text = _INVISIBLE.sub("", _LINE_END.sub("\n", text).replace("\x1f", " "))
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _too_short(text: str, words: Sequence[str], lines: Sequence[str]) -> bool:
    return len(text) < 200


def _too_many_words(text: str, words: Sequence[str], lines: Sequence[str]) -> bool:
    return len(words) > 100_000


def _word_length(text: str, words: Sequence[str], lines: Sequence[str]) -> bool:
    spaced = [word for word in words if not is_unspaced(word)]
    if 2 * len(spaced) < len(words):
        return False
    return not 3 <= sum(map(num_letters, spaced)) / len(spaced) <= 10


def _symbols(text: str, words: Sequence[str], lines: Sequence[str]) -> bool:
    return max(text.count("#"), text.count("...") + text.count("…")) > 0.1 * len(words)


def _bullets(text: str, words: Sequence[str], lines: Sequence[str]) -> bool:
    return sum(line.lstrip().startswith(_BULLETS) for line in lines) > 0.9 * len(lines)


def _ellipses(text: str, words: Sequence[str], lines: Sequence[str]) -> bool:
    return sum(line.rstrip().endswith(_ELLIPSES) for line in lines) > 0.3 * len(lines)


def _letters(text: str, words: Sequence[str], lines: Sequence[str]) -> bool:
    return sum(any(letter.isalpha() for letter in word) for word in words) < 0.8 * len(words)


def _stop_words(text: str, words: Sequence[str], lines: Sequence[str]) -> bool:
    return len(_STOP_WORDS.intersection(word.lower() for word in words)) < 2


def _repeated_lines(text: str, words: Sequence[str], lines: Sequence[str]) -> bool:
    return len(lines) - len(set(lines)) > 0.3 * len(lines)


def _repeated_pairs(text: str, words: Sequence[str], lines: Sequence[str]) -> bool:
    pairs = Counter(pairwise(words))
    if not pairs:
        return False
    (first, second), count = pairs.most_common(1)[0]
    return count > 1 and count * (len(first) + len(second)) > 0.2 * sum(map(len, words))


# name -> whether a document, its words and its lines with text break the rule
RULES: dict[str, Callable[[str, Sequence[str], Sequence[str]], bool]] = {
    "short": _too_short,  # fewer than 200 characters
    "long": _too_many_words,  # more than 100,000 words
    "word-length": _word_length,  # words of fewer than 3 or more than 10 letters on average
    "symbols": _symbols,  # more than one # or ellipsis in ten words
    "bullets": _bullets,  # more than 90 % of the lines begin with a bullet
    "ellipses": _ellipses,  # more than 30 % of the lines end with an ellipsis
    "letters": _letters,  # more than 20 % of the words have no letter
    "repeated-lines": _repeated_lines,  # more than 30 % of the lines stand twice
    "repeated-pairs": _repeated_pairs,  # one pair of words makes up more than 20 % of the letters
    "stop-words": _stop_words,  # fewer than two of eight common English words
}
DEFAULT_RULES = tuple(name for name in RULES if name != "stop-words")


def broken_rule(text: str, rules: Sequence[str]) -> str | None:
    """The first of ``rules`` that a document breaks; "empty" where it has no word."""
    words = words_of(text)
    if not words:
        return "empty"
    lines = [line for line in text.split("\n") if line.strip()]
    return next((rule for rule in rules if RULES[rule](text, words, lines)), None)
