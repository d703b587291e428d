"""Text -> tokenizer.json: a byte-level BPE, which can spell any text. The same text gives the same file."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatrain.data.console import add_input_options, run_tool
from megatrain.data.documents import DocumentReader, find_files
from megatrain.data.durable import write_durably
from megatrain.data.errors import DataError

EOD = "<|endoftext|>"
_MIN_VOCABULARY = 256 + 1  # the bytes, and the end-of-document token


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit code: 0, or 2 after an error message."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_input_options(parser)
    parser.add_argument("--output", type=Path, required=True, help="the tokenizer.json to write")
    parser.add_argument("--vocab-size", type=int, default=4096, help="tokens, at most (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a different tokenizer")
    return run_tool(parser, train, argv)


def train(arguments: argparse.Namespace) -> None:
    """Trains and writes the tokenizer.

    Raises:
        DataError: bad input or options, or another tokenizer in the way.
    """
    if arguments.vocab_size < _MIN_VOCABULARY:
        raise DataError(f"--vocab-size is {arguments.vocab_size}: at least {_MIN_VOCABULARY}, for bytes and {EOD}")
    reader = DocumentReader(arguments.field, arguments.bad)
    files = find_files(arguments.input, arguments.suffix, arguments.exclude)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=arguments.vocab_size,
        special_tokens=[EOD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator((document.text for document in reader.read(files)), trainer)
    content = tokenizer.to_str(pretty=True).encode()
    output: Path = arguments.output
    if output.exists() and output.read_bytes() == content:
        print(f"{output}: already there with this content")
        return
    if output.exists() and not arguments.overwrite:
        raise DataError(f"{output} is there and different: choose another file, or replace it by --overwrite")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_durably(output, content)
    print(f"{output}: {tokenizer.get_vocab_size()} tokens, {len(reader.bad_records)} bad records left out or repaired")


if __name__ == "__main__":
    sys.exit(main())
