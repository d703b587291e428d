"""A conversion from start to end: read, write beside the target, prove, and only then give the result its name."""

import json
import os
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from megatrain.convert.errors import ConversionError, ProofFailed
from megatrain.convert.formats import FORMATS, Choices, detect
from megatrain.convert.own_tokenizer import tokenizer_file
from megatrain.convert.proof import (
    Proof,
    proof_batches,
    require_equal_configs,
    require_equal_logits,
    require_equal_weights,
)
from megatrain.convert.table import (
    Reader,
    Weights,
    Writer,
    canonical_shapes,
    kinds_of,
    require_lines,
    their_shapes,
)
from megatrain.disk.target import require_free
from megatrain.spec.kinds import WEIGHT

RECORD = "conversion.json"
VERIFIED, NOT_VERIFIED, FAILED = "verified", "not verified (--no-verify)", "failed"


@dataclass(frozen=True)
class Request:
    """What is asked for.

    ``to``: a name of ``FORMATS``; ``longest``: tokens of the longest sequence that both models run.
    """

    source: Path
    target: Path
    to: str
    verify: bool = True
    longest: int = 2048
    choices: Choices = field(default_factory=Choices)


def convert(request: Request) -> dict[str, Any]:
    """Converts and proves; ``request.target`` exists only if all went well. Returns the record kept in it.

    Without a proof the record says so. What failed its proof is kept as ``TARGET.failed``.

    Raises:
        ConversionError, CheckpointError: the source can't be read or the target not be written.
        ProofFailed: the result is not the model that it was made from.
    """
    _require_sense(request)
    target = Path(os.path.abspath(request.target))
    partial, failed = (Path(f"{target}{end}") for end in (".partial", ".failed"))
    for place in (target, partial, failed):
        try:
            require_free(place, "remove it, or choose another target")
        except FileExistsError as error:
            raise ConversionError(str(error)) from error
    origin = detect(request.source)
    if origin == request.to:
        raise ConversionError(f"{request.source} is in the format {origin} already")
    reader = _read(origin, request)
    Weights(reader).require_complete()
    partial.mkdir(parents=True)
    try:
        record = _convert_into(partial, request, origin, reader)
    except ProofFailed as error:
        partial.rename(failed)
        raise ProofFailed(f"{error}\nthe output is not to be used and was kept as {failed}") from error
    except BaseException:
        shutil.rmtree(partial)
        raise
    partial.rename(target)
    return record


def _read(origin: str, request: Request) -> Reader:
    try:
        return FORMATS[origin].read(request.source, request.choices)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        reason = f"{type(error).__name__}: {error!s:.200}"
        raise ConversionError(f"{request.source} is not what a checkpoint of {origin} looks like: {reason}") from error


def _require_sense(request: Request) -> None:
    """Checks what can be known without a look at the model.

    Raises:
        ConversionError: names every choice that makes no sense, by its option.
    """
    choices = request.choices
    counts = {
        "--proof-tokens": request.longest,
        "--vocab-multiple": choices.vocab_multiple,
        "--zero-ranks": choices.zero_ranks,
        "--tensor-ranks": choices.tensor_ranks,
        "--shard-gb, in bytes,": choices.shard_bytes,
    }
    problems = [f"{name} = {count} is not a whole number from 1 on" for name, count in counts.items() if count < 1]
    if request.to not in FORMATS:
        problems.append(f"--to {request.to} is no format; these are: {', '.join(FORMATS)}")
    given = choices.tokenizer
    if given is not None and not given.exists():
        problems.append(f"--tokenizer {given} is not there: name a tokenizer.json or a folder with one")
    if problems:
        raise ConversionError("; ".join(problems))


def _convert_into(folder: Path, request: Request, origin: str, reader: Reader) -> dict[str, Any]:
    writer = FORMATS[request.to].write(folder, reader, request.choices)
    record: dict[str, Any] = {"from": origin, "to": request.to, "dtype": str(writer.dtype).removeprefix("torch.")}
    record |= {"model": reader.model.model_dump(mode="json"), "status": NOT_VERIFIED, "proof": None}
    left = [] if request.choices.weights_only else [kind for kind in reader.kinds if kind not in writer.kinds]
    if left:
        print(f"{', '.join(left)} stay behind: {request.to} files of this model have no states of the optimizer")
    record["left_behind"] = left
    _copy(reader, writer, request.choices.weights_only)
    try:
        if request.verify:
            record |= {"status": VERIFIED, "proof": asdict(_prove(request, origin, reader, writer, folder))}
    except ProofFailed as error:
        record |= {"status": FAILED, "problem": str(error)}
        raise
    finally:
        (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def _copy(reader: Reader, writer: Writer, weights_only: bool) -> None:
    """Writes all tensors in the writer's order; a few are in memory at a time."""
    source = Weights(reader)
    require_lines(writer.table, reader.model)
    plan = list(their_shapes(writer.table, reader.model))
    writer.begin({name: shape for entry, shapes in plan for name, shape in zip(entry.theirs, shapes, strict=True)})
    kinds = [kind for kind in reader.kinds if kind in writer.kinds and (kind == WEIGHT or not weights_only)]
    for entry, _ in tqdm(plan, desc="writing", unit="tensor", disable=None):
        for kind in kinds_of(entry.ours[0], kinds):
            tensors = entry.form.to_theirs([source.read(kind, name) for name in entry.ours], reader.model)
            for name, tensor in zip(entry.theirs, tensors, strict=True):
                writer.write(kind, name, tensor)
    writer.finish()


def _prove(request: Request, origin: str, reader: Reader, writer: Writer, folder: Path) -> Proof:
    own = replace(request.choices, trust_pickle=True, model_file=None)  # what was written just now
    written = FORMATS[request.to].read(folder, own)
    require_equal_configs(reader.model, written.model)
    batches = proof_batches(reader.model, request.longest, tokenizer_file(reader, request.choices.tokenizer))
    total = len(canonical_shapes(reader.model)) + reader.model.num_layers + 2
    with tqdm(total=total, desc="proving", disable=None) as bar:
        one = FORMATS[origin].runner(reader, writer.dtype)
        other = FORMATS[request.to].runner(written, writer.dtype)
        worst = require_equal_logits(one, other, batches, bar.update)
        count, rounded = require_equal_weights(Weights(reader), Weights(written), bar.update)
    return Proof(count, rounded, sum(batch.numel() for batch in batches), worst)
