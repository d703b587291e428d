"""Text -> token shards: text files, JSON lines, tables, folders of them or standard input in, a data-set folder out.

The output is a function of the documents, the tokenizer and the options; the number of workers doesn't change a byte.
A run that was killed goes on where it was when it is started again. Under mpirun, rank 0 reads and writes and the
other ranks encode. docs/data_format.md tells more.
"""

import argparse
import hashlib
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatrain.console import run_tool
from megatrain.data.corpus.console import add_input_options, lineage_of, print_problems, sources_of
from megatrain.data.corpus.encode import EncoderSpec, encoder_of
from megatrain.data.corpus.inputs import STDIN, InputDigest, Source, digest_of_all, digest_sources
from megatrain.data.corpus.tokenizer_files import load_tokenizer
from megatrain.data.corpus.tokenizing import Output, TokenizeRun, note_path
from megatrain.data.errors import DataError
from megatrain.data.pool import Pool, num_cores, open_mpi_pool, open_pool, runs_under_mpi
from megatrain.data.shards.manifest import MANIFEST, Manifest
from megatrain.data.shards.shuffle import shuffle_documents

# with less input than this, a worker costs more time than it saves
_BYTES_PER_WORKER = {"tokenizers": 1 << 20, "gigatoken": 32 << 20}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit code: 0, or 2 after an error message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_input_options(parser)
    parser.add_argument("--output", type=Path, required=True, help="folder of the data set")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        required=True,
        help="a tokenizer.json, SentencePiece .model, tiktoken file or WordPiece vocab.txt, or a folder with one",
    )
    parser.add_argument(
        "--eod",
        help="end-of-document token (default: the first that it has of <|endoftext|>, <|end_of_text|>, </s>, …)",
    )
    parser.add_argument("--bos", help="token to begin each document with, as <s> (default: none)")
    parser.add_argument(
        "--backend",
        choices=["auto", "tokenizers", "gigatoken"],
        default="auto",
        help="what encodes; auto takes gigatoken where it is installed and gives the tokens of tokenizers",
    )
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens that fill a shard")
    parser.add_argument("--shuffle-seed", type=int, help="shuffle the documents, by this seed (default: input order)")
    parser.add_argument("--validation-output", type=Path, help="folder of a second data set, of held-out documents")
    parser.add_argument(
        "--validation-share", type=float, default=0.02, help="documents held out, by their hash (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, help="processes (default: one per core, fewer for small inputs)")
    parser.add_argument("--overwrite", action="store_true", help="replace data sets with other content")
    return run_tool(parser, tokenize, argv)


def tokenize(arguments: argparse.Namespace) -> None:
    """Writes the data set(s), unless they are there already.

    Raises:
        DataError: bad input or options, or other data sets in the way.
    """
    if runs_under_mpi():
        with open_mpi_pool() as pool:
            if pool is not None:
                _tokenize(arguments, pool)
        return
    _tokenize(arguments, None)


def _tokenize(arguments: argparse.Namespace, pool: Pool | None) -> None:
    begun_at = time.monotonic()
    _check_options(arguments)
    sources = sources_of(arguments)
    tokenizer_json = load_tokenizer(arguments.tokenizer)
    spec = EncoderSpec(
        tokenizer=arguments.tokenizer,
        tokenizer_sha256=hashlib.sha256(tokenizer_json).hexdigest(),
        eod=arguments.eod,
        bos=arguments.bos,
        backend=arguments.backend,
        bad=arguments.bad,
        empty=arguments.empty,
        validation_share=arguments.validation_share if arguments.validation_output else 0.0,
    )
    eod = encoder_of(spec).eod
    digests = digest_sources(sources)
    outputs = _outputs(arguments, digests, spec, eod)
    if not arguments.overwrite and all([_is_reusable(output, sources) for output in outputs]):
        print(f"{', '.join(str(output.folder) for output in outputs)}: already there with this content, reused")
        _clear_up(outputs)
        return
    lineage = lineage_of("tokenize_text", arguments, digests, encoder=encoder_of(spec).backend)
    # shuffling is a second pass over what the first has written
    first = outputs if arguments.shuffle_seed is None else [_unshuffled(output) for output in outputs]
    run = TokenizeRun(sources, spec, first, tokenizer_json, arguments.shard_tokens, lineage)
    if first == outputs or not all(
        unshuffled.is_written() or output.is_written() for unshuffled, output in zip(first, outputs, strict=True)
    ):
        with open_pool(_num_workers(arguments, digests, encoder_of(spec).backend)) as local:
            run.run(pool or local)
    if arguments.shuffle_seed is not None:
        for output, unshuffled in zip(outputs, first, strict=True):
            if unshuffled.is_written():  # a killed run may have been at the second one
                shuffle_documents(unshuffled.folder, output.folder, arguments.shuffle_seed, arguments.shard_tokens)
    _report(outputs, run, time.monotonic() - begun_at)


def _check_options(arguments: argparse.Namespace) -> None:
    if arguments.validation_output and not 0 < arguments.validation_share < 1:
        raise DataError(f"--validation-share is {arguments.validation_share}: choose a number between 0 and 1")
    if arguments.shard_tokens < 1 or (arguments.workers is not None and arguments.workers < 1):
        raise DataError("--shard-tokens and --workers must be at least 1")
    if arguments.validation_output and arguments.validation_output.absolute() == arguments.output.absolute():
        raise DataError("--output and --validation-output are the same folder: choose two")


def _num_workers(arguments: argparse.Namespace, digests: Sequence[InputDigest], backend: str) -> int:
    if runs_under_mpi():
        return 1
    total = sum(digest.num_bytes for digest in digests)
    endless = any(digest.path == str(STDIN) for digest in digests)
    wanted = num_cores() if endless else min(num_cores(), total // _BYTES_PER_WORKER[backend.split()[0]])
    return arguments.workers or max(1, wanted)


def _outputs(
    arguments: argparse.Namespace, digests: Sequence[InputDigest], spec: EncoderSpec, eod: str
) -> list[Output]:
    made_from = {
        "inputs_sha256": digest_of_all(digests),
        "tokenizer_sha256": spec.tokenizer_sha256,
        "eod": eod,
        **({"bos": spec.bos} if spec.bos else {}),
        "field": arguments.field,
        "bad": spec.bad,
        "empty": spec.empty,
        "shard_tokens": arguments.shard_tokens,
        "shuffle_seed": arguments.shuffle_seed,
        "validation_share": spec.validation_share,
    }
    outputs = [Output(arguments.output, {**made_from, "split": "train"})]
    if arguments.validation_output:
        outputs.append(Output(arguments.validation_output, {**made_from, "split": "validation"}))
    return outputs


def _unshuffled(output: Output) -> Output:
    folder = output.folder.absolute()
    return Output(folder.with_name(f".{folder.name}.unshuffled"), output.made_from)


def _clear_up(outputs: Sequence[Output]) -> None:
    """Removes what a run left that was killed after its data sets had got their names."""
    note_path(outputs[0].folder).unlink(missing_ok=True)
    for unshuffled in (_unshuffled(output).folder for output in outputs):
        note_path(unshuffled).unlink(missing_ok=True)
        shutil.rmtree(unshuffled, ignore_errors=True)


def _is_reusable(output: Output, sources: Sequence[Source]) -> bool:
    """Whether the data set is there; raises DataError where another, or a damaged one, is."""
    if not (output.folder / MANIFEST).is_file():
        return False
    try:
        found = Manifest.read(output.folder).made_from
    except DataError as error:
        raise DataError(f"{error} (--overwrite writes it again)") from error
    differing = [key for key in output.made_from if found.get(key) != output.made_from[key]]
    if any(source.path == STDIN for source in sources):
        differing.append("standard input may")
    if differing:
        raise DataError(
            f"{output.folder} holds other data ({', '.join(differing)} differ): "
            "choose another folder, or replace it by --overwrite"
        )
    return True


def _report(outputs: Sequence[Output], run: TokenizeRun, seconds: float) -> None:
    num_tokens = 0
    for output in outputs:
        manifest = Manifest.read(output.folder)
        num_tokens += manifest.num_tokens
        print(
            f"{output.folder}: {manifest.num_documents} documents, {manifest.num_tokens} tokens in "
            f"{len(manifest.shards)} shards, vocabulary {manifest.vocab_size}"
        )
    if num_bytes := run.text_bytes:  # 0: an earlier start had read all of it
        print(
            f"{num_bytes} bytes of text, {num_bytes / num_tokens:.2f} bytes per token, "
            f"{seconds:.1f} s, {num_bytes / seconds / 1e6:.1f} MB/s"
        )
    print_problems(run.first_problems, run.num_problems)


if __name__ == "__main__":
    sys.exit(main())
