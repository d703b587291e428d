"""Text -> tokenizer.json.

bpe: byte-level, can spell any text. wordpiece: BERT's, for encoders. unigram: SentencePiece's, by likelihood; what
its pieces can't spell it spells in bytes.

bpe: the same text gives the same file. The library's trainers of the other two go through words in varying order: where
counts tie, wordpiece may choose otherwise, and unigram's scores vary in the fourth digit.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from megatrain.console import run_tool
from megatrain.data.corpus.chunks import read_chunks
from megatrain.data.corpus.console import add_input_options, print_problems, reader_of, sources_of
from megatrain.data.corpus.documents import RecordReader
from megatrain.data.corpus.inputs import Source
from megatrain.data.errors import DataError
from megatrain.disk.durable import write_durably
from megatrain.disk.target import require_target

EOD = "<|endoftext|>"
_BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_MODELS = ("bpe", "wordpiece", "unigram")
_PROBLEMS_SHOWN = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit code: 0, or 2 after an error message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_input_options(parser)
    parser.add_argument("--output", type=Path, required=True, help="the tokenizer.json to write")
    parser.add_argument("--model", choices=_MODELS, default="bpe", help="(default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens, at most (default: %(default)s)")
    parser.add_argument("--lowercase", action="store_true", help="wordpiece: don't tell upper from lower case")
    parser.add_argument("--special", nargs="+", default=[], help="further special tokens, as <|user|>")
    parser.add_argument("--max-bytes", type=int, help="read no more text than this (default: all)")
    parser.add_argument("--overwrite", action="store_true", help="replace a different tokenizer")
    return run_tool(parser, train, argv)


def train(arguments: argparse.Namespace) -> None:
    """Trains and writes the tokenizer.

    Raises:
        DataError: bad input or options, or another tokenizer in the way.
    """
    make = {"bpe": _bpe, "wordpiece": _wordpiece, "unigram": _unigram}[arguments.model]
    tokenizer, trainer, specials = make(arguments)
    if arguments.vocab_size < (minimum := len(specials) + len(arguments.special) + 256):
        raise DataError(f"--vocab-size is {arguments.vocab_size}: at least {minimum}, for bytes and special tokens")
    reader = reader_of(arguments)
    tokenizer.train_from_iterator(_texts(reader, sources_of(arguments), arguments.max_bytes), trainer)
    tokenizer = {"bpe": lambda made: made, "wordpiece": _numbered, "unigram": _with_bytes}[arguments.model](tokenizer)
    content = tokenizer.to_str(pretty=True).encode()
    output: Path = arguments.output
    print_problems(reader.problems[:_PROBLEMS_SHOWN], len(reader.problems))
    if output.is_file() and output.read_bytes() == content:
        print(f"{output}: already there with this content")
        return
    require_target(output, arguments.overwrite)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_durably(output, content)
    print(f"{output}: {arguments.model}, {tokenizer.get_vocab_size()} tokens")


def _texts(reader: RecordReader, sources: Sequence[Source], max_bytes: int | None) -> Iterator[str]:
    """The documents, large ones in pieces, up to so many bytes."""
    left = max_bytes
    for chunk in read_chunks(sources):
        yield from (document.text for document in reader.read(chunk))
        if left is not None and (left := left - sum(len(part.content) for part in chunk.parts)) <= 0:
            return


def _bpe(arguments: argparse.Namespace) -> tuple[Any, Any, list[str]]:
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=arguments.vocab_size,
        special_tokens=[EOD, *arguments.special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    return tokenizer, trainer, [EOD]


def _wordpiece(arguments: argparse.Namespace) -> tuple[Any, Any, list[str]]:
    tokenizer: Any = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=arguments.lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=arguments.vocab_size,
        special_tokens=[*_BERT, *arguments.special],
        show_progress=sys.stderr.isatty(),
    )
    return tokenizer, trainer, _BERT


def _unigram(arguments: argparse.Namespace) -> tuple[Any, Any, list[str]]:
    tokenizer: Any = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<unk>", EOD]
    trainer = trainers.UnigramTrainer(
        vocab_size=max(arguments.vocab_size - len(_BYTES), 1),
        special_tokens=[*specials, *arguments.special],
        unk_token="<unk>",
        show_progress=sys.stderr.isatty(),
    )
    return tokenizer, trainer, specials


def _numbered(tokenizer: Tokenizer) -> Tokenizer:
    """The WordPiece tokenizer with its pieces by length and letters: the trainer numbers them as it likes."""
    content = json.loads(tokenizer.to_str())
    specials = {token["content"] for token in content["added_tokens"]}
    vocab: dict[str, int] = content["model"]["vocab"]

    def place(token: str) -> tuple[int, int, str]:
        return (0, vocab[token], "") if token in specials else (1, len(token), token)

    content["model"]["vocab"] = {token: number for number, token in enumerate(sorted(vocab, key=place))}
    made: Any = Tokenizer.from_str(json.dumps(content))
    made.post_processor = processors.BertProcessing(*((name, made.token_to_id(name)) for name in ("[SEP]", "[CLS]")))
    return made


def _with_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """The Unigram tokenizer with a piece for each byte, worse than all others."""
    content = json.loads(tokenizer.to_str())
    pieces = content["model"]["vocab"]
    worst = min(score for _, score in pieces) - 1
    content["model"] |= {"vocab": [*pieces, *([piece, worst] for piece in _BYTES)], "byte_fallback": True}
    return Tokenizer.from_str(json.dumps(content))


if __name__ == "__main__":
    sys.exit(main())
