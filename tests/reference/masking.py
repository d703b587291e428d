"""Which tokens are hidden, one by one in Python's integers: the formulas as docs/data.md states them."""

import hashlib

_ALL = 2**64 - 1


def _finalized(x: int) -> int:
    """SplitMix64's (Steele, Lea & Flood 2014, figure 16, variant 13 of Stafford's)."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _ALL
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _ALL
    return x ^ x >> 31


def masked(
    key: str,
    sequence_id: int,
    tokens: list[int],
    real: int,
    never: set[int],
    probability: float,
    mask_token: int,
    vocab_size: int,
) -> tuple[list[int], list[int]]:
    """Devlin et al. 2019, section 3.1: inputs and labels of a sequence, of whose tokens the first ``real`` are none of
    padding."""
    digest = hashlib.blake2b(f"stream {key}".encode(), digest_size=8).digest()
    state = _finalized(sequence_id ^ int.from_bytes(digest, "little"))
    inputs, labels = list(tokens), [-100] * len(tokens)
    for place, token in enumerate(tokens):
        words = []
        for _ in range(3):
            state = (state + 0x9E3779B97F4A7C15) & _ALL
            words.append(_finalized(state))
        if place >= real or token in never or words[0] / 2**64 >= probability:
            continue
        labels[place] = token
        tenth = words[1] * 10 >> 64
        if tenth < 8:
            inputs[place] = mask_token
        elif tenth == 8:
            inputs[place] = words[2] % vocab_size
    return inputs, labels
