"""Text -> token shards: text files, folders and JSON lines in, a data-set folder out (docs/data_format.md).

The output is a function of the documents, the tokenizer and the options; the number of workers doesn't change a byte.
"""

import argparse
import collections
import concurrent.futures.process
import contextlib
import functools
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm  # type: ignore[import-untyped]

from megatrain.data.console import add_input_options, run_tool
from megatrain.data.documents import Document, DocumentReader, digest_files, find_files
from megatrain.data.errors import DataError
from megatrain.data.manifest import MANIFEST
from megatrain.data.reader import TokenDataset
from megatrain.data.writer import DatasetWriter

_BATCH_BYTES = 1 << 20  # of input in one task of a worker
_BYTES_PER_WORKER = 4 << 20  # less input than this is encoded faster than a worker starts
_BAD_RECORDS_SHOWN = 10


class Encoder:
    """Documents -> token ids, each document ended by the end-of-document token, whatever its text says.

    Raises:
        DataError: no tokenizer.json, or it has no token ``eod``.
    """

    def __init__(self, tokenizer_json: bytes, eod: str):
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # --workers says how many cores are used
        try:
            self.tokenizer: Any = Tokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # the library raises this class itself
            raise DataError(f"not a tokenizer.json: {error}") from error
        eod_id = self.tokenizer.token_to_id(eod)
        if eod_id is None:
            added = [token.content for token in self.tokenizer.get_added_tokens_decoder().values()]
            raise DataError(f"the tokenizer has no token {eod!r}: name its end-of-document token by --eod, of {added}")
        self.eod_id: int = eod_id
        self.vocab_size = max(self.tokenizer.get_vocab().values()) + 1
        # Files made for fine-tuning may cut and pad; and a "<|endoftext|>" in the text must stay text.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.add_special_tokens([eod])
        self.tokenizer.encode_special_tokens = True

    def encode(self, documents: Sequence[Document]) -> list[NDArray[np.int32]]:
        """Token ids [tokens] of each document.

        Raises:
            DataError: a text became the end-of-document token (the tokenizer's own merges make it).
        """
        encodings = self.tokenizer.encode_batch_fast(
            [document.text for document in documents], add_special_tokens=False
        )
        arrays = [np.array([*encoding.ids, self.eod_id], np.int32) for encoding in encodings]
        for document, ids in zip(documents, arrays, strict=True):
            if (ids[:-1] == self.eod_id).any():
                raise DataError(
                    f"{document.origin}: ordinary text became the end-of-document token: choose another --eod"
                )
        return arrays


class Output(NamedTuple):
    """One data set to write, and what its content is a function of."""

    folder: Path
    made_from: dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit code: 0, or 2 after an error message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_input_options(parser)
    parser.add_argument("--output", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer.json")
    parser.add_argument("--eod", default="<|endoftext|>", help="end-of-document token (default: %(default)s)")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens that fill a shard")
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
    files = find_files(arguments.input, arguments.suffix, arguments.exclude)
    tokenizer_json = arguments.tokenizer.read_bytes()
    encoder = Encoder(tokenizer_json, arguments.eod)
    outputs = _outputs(arguments, files, hashlib.sha256(tokenizer_json).hexdigest())
    if not arguments.overwrite and all([_is_written(output) for output in outputs]):
        print(f"{', '.join(str(output.folder) for output in outputs)}: already there with this content, reused")
        return
    reader = DocumentReader(arguments.field, arguments.bad)
    total = sum(path.stat().st_size for path in files)
    num_cores = len(os.sched_getaffinity(0))
    workers = arguments.workers or max(1, min(num_cores, total // _BYTES_PER_WORKER))
    start_encoder = functools.partial(Encoder, tokenizer_json, arguments.eod)
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(
                DatasetWriter(
                    output.folder,
                    tokenizer=tokenizer_json,
                    tokenizer_name=arguments.tokenizer.name,
                    vocab_size=encoder.vocab_size,
                    eod_id=encoder.eod_id,
                    shard_tokens=arguments.shard_tokens,
                    made_from=output.made_from,
                )
            )
            for output in outputs
        ]
        # on a terminal only: a log file has no use for a bar
        bar = stack.enter_context(tqdm(total=total, unit="B", unit_scale=True, desc="tokenize", disable=None))
        for documents, arrays in encode_all(_batches(reader.read(files)), start_encoder, workers):
            for document, ids in zip(documents, arrays, strict=True):
                held_out = len(writers) > 1 and is_held_out(document.text, arguments.validation_share)
                writers[held_out].add(ids)
            bar.update(sum(document.num_bytes for document in documents))
        # validation first: if it has no documents, neither data set comes into being
        manifests = [writer.finish() for writer in reversed(writers)]
    for output, manifest in zip(outputs, reversed(manifests), strict=True):
        print(
            f"{output.folder}: {manifest.num_documents} documents, {manifest.num_tokens} tokens in "
            f"{len(manifest.shards)} shards, vocabulary {manifest.vocab_size}"
        )
    _report(reader, total, sum(manifest.num_tokens for manifest in manifests))


def encode_all(
    batches: Iterator[list[Document]], start_encoder: "functools.partial[Encoder]", workers: int
) -> Iterator[tuple[list[Document], list[NDArray[np.int32]]]]:
    """Each batch with its token ids, in order; with several workers, two batches each are under way."""
    if workers == 1:
        encoder = start_encoder()
        yield from ((batch, encoder.encode(batch)) for batch in batches)
        return
    spawn = multiprocessing.get_context("spawn")  # threads (the progress bar's) don't survive a fork
    with concurrent.futures.ProcessPoolExecutor(workers, spawn, _start_worker, (start_encoder,)) as pool:
        pending: collections.deque[tuple[list[Document], concurrent.futures.Future[list[NDArray[np.int32]]]]]
        pending = collections.deque()
        try:
            for batch in batches:
                pending.append((batch, pool.submit(_encode_in_worker, batch)))
                if len(pending) == 2 * workers:
                    oldest, future = pending.popleft()
                    yield oldest, future.result()
            for oldest, future in pending:
                yield oldest, future.result()
        except concurrent.futures.process.BrokenProcessPool as error:
            raise DataError("a worker process died (out of memory?): try fewer --workers") from error
        finally:
            pool.shutdown(cancel_futures=True)


def is_held_out(text: str, share: float) -> bool:
    """Whether a document belongs to the validation set: by its content alone, so copies of it stay together."""
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
    return number < share * 2**64


_worker_encoder: Encoder | None = None


def _start_worker(start_encoder: "functools.partial[Encoder]") -> None:
    global _worker_encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _worker_encoder = start_encoder()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(batch: list[Document]) -> list[NDArray[np.int32]]:
    assert _worker_encoder is not None
    return _worker_encoder.encode(batch)


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.num_bytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _outputs(arguments: argparse.Namespace, files: Sequence[Path], tokenizer_sha256: str) -> list[Output]:
    share = arguments.validation_share if arguments.validation_output else 0.0
    if arguments.validation_output and not 0 < share < 1:
        raise DataError(f"--validation-share is {share}: choose a number between 0 and 1")
    if arguments.shard_tokens < 1 or (arguments.workers is not None and arguments.workers < 1):
        raise DataError("--shard-tokens and --workers must be at least 1")
    made_from = {
        "inputs_sha256": digest_files(files),
        "tokenizer_sha256": tokenizer_sha256,
        "eod": arguments.eod,
        "field": arguments.field,
        "bad": arguments.bad,
        "shard_tokens": arguments.shard_tokens,
        "validation_share": share,
    }
    outputs = [Output(arguments.output, {**made_from, "split": "train"})]
    if arguments.validation_output:
        if arguments.validation_output.absolute() == arguments.output.absolute():
            raise DataError("--output and --validation-output are the same folder: choose two")
        outputs.append(Output(arguments.validation_output, {**made_from, "split": "validation"}))
    return outputs


def _is_written(output: Output) -> bool:
    """Whether the data set is there; raises DataError where another, or a damaged one, is."""
    if not (output.folder / MANIFEST).is_file():
        return False
    try:
        found = TokenDataset.open(output.folder).manifest
    except DataError as error:
        raise DataError(f"{error} (--overwrite writes it again)") from error
    there = found.made_from if found else {}
    differing = [key for key in output.made_from if there.get(key) != output.made_from[key]]
    if differing:
        raise DataError(
            f"{output.folder} holds other data ({', '.join(differing)} differ): "
            "choose another folder, or replace it by --overwrite"
        )
    return True


def _report(reader: DocumentReader, num_bytes: int, num_tokens: int) -> None:
    print(f"{num_bytes} bytes of input, {num_bytes / num_tokens:.2f} bytes per token")
    if reader.num_empty:
        print(f"{reader.num_empty} empty documents left out")
    if reader.bad_records:
        done = "repaired or left out" if reader.bad == "replace" else "left out"
        print(f"{len(reader.bad_records)} bad records {done}:")
        for record in reader.bad_records[:_BAD_RECORDS_SHOWN]:
            print(f"  {record}")
        if len(reader.bad_records) > _BAD_RECORDS_SHOWN:
            print(f"  … and {len(reader.bad_records) - _BAD_RECORDS_SHOWN} more")


if __name__ == "__main__":
    sys.exit(main())
