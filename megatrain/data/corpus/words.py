"""Words of a text in any script: by spaces, and letter by letter where a script writes none between words."""

import re

# Thai, Lao, Tibetan, Burmese, Khmer, kana, and Chinese characters
_UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_HANGUL = re.compile("[\uac00-\ud7a3]")
_LETTER = re.compile(f"[{_UNSPACED}]")
_WORD = re.compile(rf"[{_UNSPACED}][^\w\s]*|[^\s{_UNSPACED}]+")


def words_of(text: str) -> list[str]:
    """The words, each with the punctuation behind it."""
    return _WORD.findall(text) if _LETTER.search(text) else text.split()


def is_unspaced(word: str) -> bool:
    """Whether it is one letter of a script without spaces."""
    return _LETTER.match(word) is not None


def num_letters(word: str) -> int:
    """Its length in letters: a Hangul syllable is written with two or three, and counts as two."""
    return len(word) + len(_HANGUL.findall(word))
