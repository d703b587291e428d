"""SentencePiece models -> the content of a tokenizer.json."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers

from megatrain.config.extras import missing
from megatrain.data.errors import DataError

_SPACE = "▁"  # how SentencePiece writes a space
_COMPARED = (
    "The quick brown fox's 12,345 jumps.",
    "  two  spaces\tand\na line ",
    "Съешь же ещё этих мягких французских булок",
    "日本語のテキスト、１２３。 한국어 ภาษาไทย العربية हिन्दी",
    "cafe\u0301 \u1112\u1161\u11ab ﬁ ① ½ ª",
    "🙂👍🏽👨‍👩‍👧 \u200b\u00a0x",
)
_AROUND_SYMBOLS = ("{0}", "a{0}b", "one {0} two", "{0}{1}", "x {0}{0} {1}y", " {0} ")


def from_sentencepiece(path: Path, content: bytes) -> bytes:
    """The tokenizer.json of a Unigram or BPE model; its control tokens become special tokens.

    It is compared with sentencepiece itself, on texts that hold every symbol that the model defines.

    Raises:
        DataError: no such model, one that gives other tokens, or sentencepiece is not installed.
    """
    try:
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    except ImportError as error:
        raise DataError(missing("sentencepiece", f"reading {path}", error)) from error
    proto = sentencepiece_model_pb2.ModelProto()
    try:
        proto.ParseFromString(content)
    except Exception as error:  # whatever the protobuf library of the day raises
        raise DataError(f"{path} is not a SentencePiece model: {error}") from error
    if proto.trainer_spec.treat_whitespace_as_suffix:
        raise DataError(
            f"{path} writes spaces at the ends of words (treat_whitespace_as_suffix), which no tokenizer.json does: "
            "train the model without it"
        )
    spec, pieces = proto.trainer_spec, [(piece.piece, piece.score) for piece in proto.pieces]
    if spec.model_type == spec.UNIGRAM:
        model: Any = models.Unigram(pieces, spec.unk_id, spec.byte_fallback)
    elif spec.model_type == spec.BPE:
        vocab = {piece: number for number, (piece, _) in enumerate(pieces)}
        unknown = pieces[spec.unk_id][0]
        merges = _merges(proto, vocab)
        model = models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=spec.byte_fallback)
    else:
        raise DataError(f"{path}: SentencePiece models of words or characters can't be read, only Unigram and BPE")
    tokenizer = Tokenizer(model)
    _set_spaces(tokenizer, proto)
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece
    tokenizer.add_special_tokens([piece.piece for piece in proto.pieces if piece.type in (kind.CONTROL, kind.UNKNOWN)])
    symbols = [piece.piece for piece in proto.pieces if piece.type == kind.USER_DEFINED]
    tokenizer.add_tokens(symbols)
    _compare(path, SentencePieceProcessor(model_proto=content), tokenizer, symbols)
    return tokenizer.to_str(pretty=True).encode()


def _compare(path: Path, theirs: Any, ours: Tokenizer, symbols: Sequence[str]) -> None:
    """Refuses a model from which the two libraries make other tokens."""
    around = [
        template.format(symbol.replace(_SPACE, " "), following.replace(_SPACE, " "))
        for symbol, following in zip(symbols, [*symbols[1:], *symbols[:1]], strict=True)
        for template in _AROUND_SYMBOLS
    ]
    for text in (*_COMPARED, *around):
        wanted, found = theirs.encode(text), ours.encode(text, add_special_tokens=False).ids
        if found != wanted:
            cure = "take the tokenizer.json that its publisher gives"
            if symbols:
                named = ", ".join(symbols[:5]) + ", …" * (len(symbols) > 5)
                cure = f"train it without its user-defined symbols ({named}), or {cure}"
            raise DataError(
                f"{path}: no tokenizer.json does what this model does. sentencepiece encodes {text!r} as {wanted}, "
                f"the tokenizer.json as {found}: {cure}"
            )


def _merges(proto: Any, vocab: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, best score first."""
    kind = proto.SentencePiece
    found = []
    for number, piece in enumerate(proto.pieces):
        if piece.type not in (kind.NORMAL, kind.UNUSED):
            continue
        halves = [(piece.piece[:at], piece.piece[at:]) for at in range(1, len(piece.piece))]
        known = [(vocab[a], vocab[b], a, b) for a, b in halves if a in vocab and b in vocab]
        found += [(-piece.score, number, a, b) for *_, a, b in sorted(known)]
    return [(a, b) for *_, a, b in sorted(found, key=lambda merge: merge[:2])]


def _set_spaces(tokenizer: Tokenizer, proto: Any) -> None:
    spec = proto.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        # The library looks letters and their marks up one by one where they take six bytes or more; SentencePiece
        # looks up the longest run.
        steps += [normalizers.NFC(), normalizers.Precompiled(spec.precompiled_charsmap)]
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])  # type: ignore[assignment]
    undo: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        undo.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(undo)  # type: ignore[assignment]
