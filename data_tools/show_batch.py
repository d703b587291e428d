"""What any rank of a run saw at a step, as text; and which steps saw a document or a string.

    python data_tools/show_batch.py --run runs/quickstart --step 5 --rank 1
    python data_tools/show_batch.py --run runs/quickstart --find "import os"

Needs the run folder and the data sets; no checkpoint, and no other process.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from megatrain.config.derive import data_parallel_rank, num_ranks
from megatrain.config.load import from_yaml
from megatrain.config.reading.problems import ConfigError
from megatrain.console import run_tool
from megatrain.data.errors import DataError
from megatrain.data.feed.loader import SAMPLE_BITS
from megatrain.data.feed.training import TrainingData
from megatrain.data.shards.reader import TokenDataset
from megatrain.spec.derive import num_tokens
from megatrain.spec.labels import IGNORE

_MOST_DOCUMENTS = 20  # that --find reports


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit code: 0, or 2 after an error message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run folder")
    parser.add_argument("--rank", type=int, default=0, help="rank whose sequences are shown (default: %(default)s)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--step", type=int, help="show what was read at this step (the first is 1)")
    what.add_argument("--document", metavar="SOURCE:NUMBER", help="the steps that read a document")
    what.add_argument("--find", metavar="TEXT", help="the documents that hold a text, and the steps that read them")
    return run_tool(parser, show, argv)


def show(arguments: argparse.Namespace) -> None:
    """Prints what the options ask for.

    Raises:
        DataError: no such run, step, rank or document, or the data can't be read.
    """
    data = opened(arguments.run)
    if arguments.step is not None:
        lines = batch_lines(data, arguments.step, arguments.rank)
    elif arguments.document is not None:
        lines = document_lines(data, *_named(data, arguments.document))
    else:
        lines = (line for place in found(data, arguments.find) for line in document_lines(data, *place))
    for line in lines:
        print(line)


def opened(run: Path) -> TrainingData:
    """The training data of a run, as its latest start read it."""
    if not run.is_dir():
        what = "is a file" if run.exists() else "is not there"
        place = "" if run.is_absolute() else f" (looked for from {Path.cwd()})"
        raise DataError(f"--run {run} {what}{place}: name the folder of a run, as runs/quickstart")
    for name in ("config.yaml", "data.json"):
        if not (run / name).is_file():
            raise DataError(f"{run} is not the folder of a run: it has no {name}, which a run writes at its start")
    try:
        config = from_yaml((run / "config.yaml").read_text(encoding="utf-8"))
        saved = json.loads((run / "data.json").read_text(encoding="utf-8"))
    except (OSError, ConfigError, ValueError) as error:
        raise DataError(f"{run} is not the folder of a run: {error}") from error
    data = TrainingData(config, num_tokens(config.model))
    data.replay(saved)
    return data


def batch_lines(data: TrainingData, step: int, rank: int) -> Iterator[str]:
    """The sequences of a rank at a step, each below a line that says where it comes from."""
    parallel = data.config.parallel
    world_size = num_ranks(parallel)
    last = data.config.train.steps
    if not 1 <= step <= last or not 0 <= rank < world_size:
        raise DataError(
            f"step {step} of rank {rank}: steps count from 1, and the run has {last} of them and ranks 0 to "
            f"{world_size - 1}"
        )
    dp_rank = data_parallel_rank(parallel, rank)
    yield f"step {step}, rank {rank} (data-parallel rank {dp_rank} of {parallel.dp})"
    batch = data.loader(dp_rank, parallel.dp).batch(step - 1)
    first = data.steps.first_sample(step - 1)
    samples = batch.sample_ids.numpy() & SAMPLE_BITS
    columns = (column.tolist() for column in (samples, *data.blend(samples)))
    for row, (sample, source, index) in enumerate(zip(*columns, strict=True)):
        name = data.names[source]
        epoch = index / data.samples[name].num_samples
        documents = ", ".join(map(str, _documents(data, name, index)))
        yield ""
        yield (
            f"--- sequence {row}: sample {sample} ({sample - first} of the step), {name} {index} "
            f"(epoch {epoch:.3f}), documents {documents}"
        )
        yield _decoded(data.datasets[name], batch.tokens[row].tolist())
        if data.config.data.objective != "causal":  # the next tokens stand there to be read
            yield _labels(data.datasets[name], batch.labels[row].tolist())


def document_lines(data: TrainingData, name: str, number: int) -> Iterator[str]:
    """The steps, up to the run's last, that read a document."""
    source, samples = data.names.index(name), data.samples[name]
    begin, end = data.datasets[name].document_bounds(number)
    yield f"{name}:{number} ({end - begin} tokens): {_excerpt(data, name, number)}"
    last = data.steps.first_sample(data.config.train.steps)
    consumed = data.blend.counts(last)[source]
    seen = False
    for epoch in range(-(-consumed // samples.num_samples)):
        for index in samples.holding(begin, end, epoch):
            if index < consumed:
                seen = True
                sample = data.blend.sample_of(source, index)
                step = data.steps.step_of(sample)
                yield f"  step {step}: sample {sample}, data-parallel rank {_reader(data, step, sample)}"
    if not seen:
        yield "  no step reads it"


def found(data: TrainingData, text: str) -> Iterator[tuple[str, int]]:
    """The first documents whose text holds ``text``."""
    count = 0
    for name, dataset in data.datasets.items():
        for number in range(dataset.num_documents):
            if text in _decoded(dataset, dataset.document(number).tolist()):
                yield name, number
                count += 1
                if count == _MOST_DOCUMENTS:
                    return
    if not count:
        raise DataError(f"no document holds {text!r}")


def _named(data: TrainingData, text: str) -> tuple[str, int]:
    name, _, number = text.rpartition(":")
    if name not in data.datasets or not number.isdigit() or int(number) >= data.datasets[name].num_documents:
        known = ", ".join(f"{name}:0 to {d.num_documents - 1}" for name, d in data.datasets.items())
        raise DataError(f"no document {text}: there are {known}")
    return name, int(number)


def _documents(data: TrainingData, name: str, index: int) -> list[int]:
    """Numbers of the documents that a sample has tokens of."""
    dataset = data.datasets[name]
    numbers: list[int] = []
    for start, count in data.samples[name].spans(index):
        numbers += range(dataset.document_of(start), dataset.document_of(start + count - 1) + 1)
    return numbers


def _reader(data: TrainingData, step: int, sample: int) -> int:
    """The data-parallel rank that reads a sample (its first part, where it is cut)."""
    shape, dp = data.steps.shape(step - 1), data.config.parallel.dp or 1
    number = (sample - data.steps.first_sample(step - 1)) * (data.steps.window // shape.seq_len)
    return number // (shape.batch_size // dp)


def _decoded(dataset: TokenDataset, ids: list[int]) -> str:
    if dataset.tokenizer_path is None:
        return str(ids)
    return str(Tokenizer.from_file(str(dataset.tokenizer_path)).decode(ids, skip_special_tokens=False))


def _labels(dataset: TokenDataset, labels: list[int]) -> str:
    """The places that have a label, and what it is."""
    told = {place: label for place, label in enumerate(labels) if label != IGNORE}
    listed = ", ".join(f"{place}: {_decoded(dataset, [label])!r}" for place, label in told.items())
    return f"labels at {len(told)} of {len(labels)} places: {listed}"


def _excerpt(data: TrainingData, name: str, number: int) -> str:
    text = _decoded(data.datasets[name], data.datasets[name].document(number)[:30].tolist())
    return repr(text[:60])


if __name__ == "__main__":
    sys.exit(main())
