"""Encoders: any tokenizer file; gigatoken equals tokenizers, pieces the whole; text is never a control token."""

import base64
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megatrain.data.corpus import encode
from megatrain.data.corpus.encode import BackendMismatch, Encoder
from megatrain.data.corpus.tokenizer_files import load_tokenizer
from megatrain.data.errors import DataError
from tests.data.factory import byte_tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dogs, again and again.\n\nIt's 12345 o'clock; WE'LL see.",
    "naïve café １２３ ﬁne 日本語のテキスト 🙂👍🏽 \u200b",
    "  two  spaces\tand tabs \r\n and ends ",
    "x = {'a': 1}\n\n\n    return x  # comment",
    "<|endoftext|> <s> </s> [SEP] <unk> <0x41>",
]


@pytest.fixture(scope="module")
def bpe():
    """A byte-level BPE with merges, as train_tokenizer.py makes it, and a further special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|user|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer.to_str().encode()


def ids_of(encoder: Encoder, text: str) -> list[int]:
    return encoder.encode([text])[0].tolist()


def test_a_sentencepiece_model_gives_its_own_tokens(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "in.txt").write_text("\n".join(TEXTS * 20))
    for kind in ("bpe", "unigram"):
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / "in.txt"),
            model_prefix=str(tmp_path / kind),
            model_type=kind,
            vocab_size=420 if kind == "bpe" else 330,
            byte_fallback=True,
            minloglevel=2,
            normalization_rule_name="identity" if kind == "bpe" else "nmt_nfkc",
            remove_extra_whitespaces=kind == "unigram",
        )
        theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / f"{kind}.model"))
        ours = Encoder(load_tokenizer(tmp_path / f"{kind}.model"))
        assert (ours.eod, ours.eod_id, ours.vocab_size) == ("</s>", theirs.eos_id(), theirs.vocab_size())
        for text in TEXTS:
            assert ids_of(ours, text) == theirs.encode(text) or text == TEXTS[-1]
        spelled = ids_of(ours, TEXTS[-1])  # cut where a control token's name begins, which SentencePiece need not do
        assert not [number for number in set(spelled) if theirs.is_control(number) or theirs.is_unknown(number)]
        assert theirs.decode(spelled).replace("  ", " ") == TEXTS[-1]
    for options, message in (
        ({"treat_whitespace_as_suffix": True}, r"spaces at the ends of words \(treat_whitespace_as_suffix\)"),
        ({"user_defined_symbols": ["<sep>", "fox"]}, r"sentencepiece encodes .* as .*symbols \(<sep>, fox\)"),
    ):
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / "in.txt"),
            model_prefix=str(tmp_path / "other"),
            model_type="bpe",
            vocab_size=140,
            minloglevel=2,
            **options,
        )
        with pytest.raises(DataError, match=message):
            load_tokenizer(tmp_path / "other.model")
    with pytest.raises(DataError, match="is not a SentencePiece model"):
        (tmp_path / "bpe.model").write_bytes(b"\nnonsense")
        load_tokenizer(tmp_path / "bpe.model")


def test_a_tiktoken_file_gives_its_own_tokens(tmp_path, bpe):
    tiktoken = pytest.importorskip("tiktoken")
    vocab = json.loads(bpe)["model"]["vocab"]
    byte_of = {letter: byte for byte, letter in Encoding.letters().items()}
    tokens = [bytes(byte_of[letter] for letter in token) for token in vocab if not token.startswith("<|")]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    ranks[b"ween fox"] = len(ranks)  # no merges lead there
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    for name in ("cl100k_base", "o200k_base"):
        path = tmp_path / f"{name}.tiktoken"
        path.write_bytes(b"".join(lines))
        pattern = Encoding.pattern(name)
        theirs = tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        ours = Encoder(load_tokenizer(path))
        assert ours.eod == "<|endoftext|>"
        for text in TEXTS:
            assert ids_of(ours, text) == theirs.encode(text, disallowed_special=())
    path.rename(tmp_path / "mine.tiktoken")
    with pytest.raises(DataError, match="doesn't say how text is split; name it after its encoding, one of gpt2"):
        load_tokenizer(tmp_path / "mine.tiktoken")


class Encoding:
    """What the published encodings say."""

    @staticmethod
    def letters() -> dict[int, str]:
        from megatrain.data.corpus.tokenizer_files import _byte_letters

        letters = _byte_letters()
        assert sorted(letters.values()) == sorted(pre_tokenizers.ByteLevel.alphabet())
        assert "".join(letters[byte] for byte in " é".encode()) == "ĠÃ©"
        return letters

    @staticmethod
    def pattern(name: str) -> str:
        from megatrain.data.corpus.tokenizer_files import _TIKTOKEN

        return _TIKTOKEN[name][0]


def test_a_wordpiece_vocabulary(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "fox", "##es", ","]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    encoder = Encoder(load_tokenizer(tmp_path))
    assert encoder.eod == "[SEP]"
    assert ids_of(encoder, "The Foxes, the [SEP]") == [4, 5, 6, 7, 4, 1, 1, 1]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert ids_of(Encoder(load_tokenizer(tmp_path)), "the Fox") == [4, 1]
    with pytest.raises(DataError, match=r"holds no tokenizer.json"):
        load_tokenizer(tmp_path.parent)


def test_gigatoken_gives_the_tokens_of_tokenizers(bpe):
    pytest.importorskip("gigatoken")
    fast, slow = Encoder(bpe, backend="gigatoken"), Encoder(bpe)
    assert (fast.backend.split()[0], slow.backend.split()[0]) == ("gigatoken", "tokenizers")
    generator = random.Random(3)
    letters = " \n\tabcXYZ'0189.,<|>é日🙂\u0301\u00a0\ufeff"
    texts = [*TEXTS, "<|user|>", *("".join(generator.choices(letters, k=200)) for _ in range(300))]
    for text in texts:
        assert ids_of(fast, text) == ids_of(slow, text)


def test_gigatoken_is_found_out(bpe, monkeypatch):
    class Wrong:
        def encode(self, text):
            return np.array([*Encoder(bpe).encode([text])[0][:-1], 7])

    monkeypatch.setattr(encode, "_gigatoken", lambda *_: Wrong())
    encoder = Encoder(bpe, backend="gigatoken")
    with pytest.raises(BackendMismatch, match="gigatoken gives other tokens than tokenizers"):
        encoder.check(TEXTS, 1000)


def test_a_tokenizer_that_gigatoken_cannot_read(tmp_path):
    words = ["[UNK]", "[SEP]", "[CLS]", "the"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    content = load_tokenizer(tmp_path)
    assert Encoder(content, backend="auto").backend.startswith("tokenizers")
    with pytest.raises(DataError, match=r"--backend gigatoken: .*--backend tokenizers takes every tokenizer"):
        Encoder(content, backend="gigatoken")


@settings(max_examples=150, deadline=None)
@given(text=st.text(min_size=1, max_size=300))
def test_any_text_comes_back_and_never_ends_a_document(text):
    text = text.encode("utf-8", "replace").decode()
    for whole in (text, f"<|endoftext|>{text}<|endoftext|>"):
        ids = ids_of(ENCODER, whole)
        assert ENCODER.eod_id not in ids
        assert ENCODER.tokenizer.decode(ids) == whole


ENCODER = Encoder(byte_tokenizer())


@pytest.mark.parametrize("backend", ["tokenizers", "auto"])
def test_pieces_give_the_tokens_of_the_whole(bpe, monkeypatch, backend):
    generator = random.Random(5)
    text = " ".join(generator.choices(" ".join(TEXTS[:4]).split(" "), k=2000)) + " " * 500 + "the end of it all"
    encoder = Encoder(bpe, backend=backend)
    whole = ids_of(encoder, text)
    monkeypatch.setattr(encode, "PIECE_BYTES", 700)
    assert len(encoder.pieces(text)) > 10
    assert ids_of(encoder, text) == whole


def test_a_tokenizer_that_begins_with_a_space(monkeypatch):
    """SentencePiece's way: every text gets a space in front, so a cut must take one away."""
    tokenizer = Tokenizer(models.BPE({"</s>": 0, "<unk>": 1, "▁": 2, "a": 3, "b": 4, "▁a": 5}, [("▁", "a")]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens(["</s>"])
    encoder = Encoder(tokenizer.to_str().encode())
    text = "ab a b ba " * 100 + "a"
    whole = ids_of(encoder, text)
    monkeypatch.setattr(encode, "PIECE_BYTES", 50)
    assert len(encoder.pieces(text)) > 10
    assert ids_of(encoder, text) == whole


def test_a_million_spaces(bpe):
    for backend in ("tokenizers", "auto"):
        encoder = Encoder(bpe, backend=backend)
        ids = ids_of(encoder, " " * 1_000_000)
        assert encoder.tokenizer.decode(ids) == " " * 1_000_000


def test_added_tokens_that_are_not_special_are_tokens():
    tokenizer = Tokenizer.from_buffer(byte_tokenizer())
    tokenizer.add_tokens([AddedToken("    ", special=False)])
    for backend in ("tokenizers", "auto"):
        assert ids_of(Encoder(tokenizer.to_str().encode(), backend=backend), "    ") == [257]
