"""Looks at, checks, compares and tidies checkpoints.

python launch/checkpoint.py ls runs/quickstart
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm  # type: ignore[import-untyped]

from megatrain.checkpoint.store.arrays import CheckpointReader, problem_of
from megatrain.checkpoint.store.errors import CheckpointError
from megatrain.checkpoint.store.folder import (
    checkpoint_at,
    checkpoint_remains,
    list_checkpoints,
    run_checkpoints,
    step_of,
)
from megatrain.checkpoint.store.lock import FolderLock
from megatrain.checkpoint.store.retention import Retention, prune, surplus_checkpoints
from megatrain.checkpoint.tools import inspect
from megatrain.checkpoint.tools.merge import average_factors, decay_of, ema_factors, merge
from megatrain.checkpoint.tools.rebuild import rebuild_manifest
from megatrain.console import add_debug_option, run_tool


def main(arguments: list[str]) -> int:
    """The program; returns its exit code: 0, 1 where something is damaged or differs, 2 after a mistake,
    74 where the disk needs somebody."""
    return run_tool(parser(), lambda options: options.run(options), arguments)


def parser() -> argparse.ArgumentParser:
    """Every command with its options."""
    whole = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = whole.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: object, about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about, description=about)
        add_debug_option(added)
        added.set_defaults(run=run)
        return added

    a_run = "a run's folder, or its folder of checkpoints"
    one = "a checkpoint's folder, or a run's for its newest checkpoint"
    command("ls", ls, "list the checkpoints of a run").add_argument("folder", type=Path, help=a_run)
    added = command("verify", verify, "read every chunk and say what is damaged")
    added.add_argument("checkpoints", type=Path, nargs="+", metavar="checkpoint", help=one)
    added.add_argument(
        "--threads", type=positive, default=4, help="chunks that are read at once (default: %(default)s)"
    )
    added = command("diff", diff, "compare two checkpoints tensor by tensor")
    added.add_argument("first", type=Path, help=one)
    added.add_argument("second", type=Path, help=one)
    added.add_argument("--all", action="store_true", help="list equal tensors, too")
    command("show", show, "print the tree of tensors").add_argument("checkpoint", type=Path, help=one)
    added = command("prune", prune_run, "delete checkpoints that the rules give up")
    added.add_argument("folder", type=Path, help=a_run)
    added.add_argument("--keep-last", type=positive, required=True, help="how many of the newest stay")
    added.add_argument("--keep-every", type=positive, default=0, help="steps divisible by it stay, too")
    added.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    added = command("merge", merge_all, "average several checkpoints of one model, in the given order")
    added.add_argument("checkpoints", type=Path, nargs="+", metavar="checkpoint", help=one)
    added.add_argument("--output", type=Path, required=True, help="folder for the new step-… folder")
    about = "a moving average with this decay (0 to below 1), not the mean"
    added.add_argument("--ema", type=decay, metavar="DECAY", help=about)
    added = command("rebuild", rebuild, "make a lost or damaged manifest again from the arrays' own headers")
    added.add_argument("checkpoint", type=Path, help="a step-… folder")
    whole.epilog = "".join(added.format_usage().replace("usage: ", "") for added in commands.choices.values())
    return whole


def ls(options: argparse.Namespace) -> int:
    folder = run_checkpoints(options.folder)
    found = list_checkpoints(folder)
    damaged = 0
    for path in found:
        if problem := problem_of(path):
            damaged += 1
            print(f"{path.name}  DAMAGED  {problem}")
        else:
            reader = CheckpointReader(path)
            size, tokens = inspect.total_bytes(reader), reader.state.get("tokens")
            told = f"{tokens:,}" if isinstance(tokens, int) else "?"
            print(f"{path.name}  {size / 2**30:10.3f} GiB  {told:>16} tokens  run {reader.run_id}")
    for path in checkpoint_remains(folder):
        if path not in found and path.name != "latest":
            print(f"{path.name}  not a checkpoint: its manifest is lost or never came, or it is being removed")
    print(f"{len(found)} checkpoints in {folder}" + (f", {damaged} of them damaged" if damaged else ""))
    return 1 if damaged else 0


def verify(options: argparse.Namespace) -> int:
    damaged = mistaken = 0
    for named in options.checkpoints:
        try:
            path = checkpoint_at(named)
        except CheckpointError as error:
            mistaken += 1
            print(f"error: {error}", file=sys.stderr)
            continue
        problems = problems_of(path, options.threads)
        damaged += bool(problems)
        for problem in problems:
            print(problem)
        print(f"{path}: {f'{len(problems)} problems' if problems else 'whole'}")
    return 2 if mistaken else 1 if damaged else 0


def problems_of(path: Path, threads: int) -> list[str]:
    """Everything that is wrong with a checkpoint, of which every byte is read."""
    try:
        reader = CheckpointReader(path)
    except CheckpointError as error:
        return [str(error)]
    with bar(inspect.total_bytes(reader), path.name) as progress:
        return inspect.verify(reader, threads, progress)


def diff(options: argparse.Namespace) -> int:
    first, second = (CheckpointReader(checkpoint_at(path)) for path in (options.first, options.second))
    total = different = 0
    with bar(inspect.total_bytes(first), "diff") as progress:
        for found in inspect.differences(first, second, progress):
            total, different = total + 1, different + (not found.equal)
            told = found.note or f"max {found.largest:.3e}  relative {found.relative:.3e}"
            if options.all or not found.equal:
                tqdm.write(f"{found.key[0]:<12} {found.key[1]:<50} {'bit-equal' if found.equal else told}")
    print(f"{total - different} of {total} tensors are bit-equal, {different} differ")
    return 1 if different else 0


def show(options: argparse.Namespace) -> int:
    reader = CheckpointReader(checkpoint_at(options.checkpoint))
    for depth, label, told, size in inspect.tree(reader):
        print(f"{'  ' * depth + label:<44} {size:>16,} bytes  {told}".rstrip())
    print(
        f"{len(reader.arrays)} arrays, {inspect.total_bytes(reader):,} bytes; step {reader.step}, run {reader.run_id}"
    )
    return 0


def prune_run(options: argparse.Namespace) -> int:
    folder, rule = run_checkpoints(options.folder), Retention(options.keep_last, options.keep_every)
    damaged = [path for path in list_checkpoints(folder) if problem_of(path)]
    steps = [step for path in damaged if (step := step_of(path.name)) is not None]
    if options.dry_run:
        for path in surplus_checkpoints(folder, rule, steps):
            print(f"would remove {path}")
        return 0
    with FolderLock(folder):
        for path in prune(folder, rule, steps):
            print(f"removed {path}")
    for path in damaged:
        print(f"kept {path}: it is damaged, and no rule is for those")
    return 0


def merge_all(options: argparse.Namespace) -> int:
    sources = [CheckpointReader(checkpoint_at(path)) for path in options.checkpoints]
    count = len(sources)
    factors = average_factors(count) if options.ema is None else ema_factors(count, options.ema)
    with FolderLock(options.output), bar(sum(map(inspect.total_bytes, sources)), "merge") as progress:
        path = merge(sources, factors, options.output, progress)
    print(f"wrote {path}")
    return 0


def rebuild(options: argparse.Namespace) -> int:
    place = Path(os.path.realpath(options.checkpoint)).parent  # a run that goes on there would replace what is rebuilt
    with FolderLock(place), bar(None, "rebuild") as progress:
        manifest = rebuild_manifest(options.checkpoint, progress)
    print(f"{options.checkpoint}: {len(manifest.arrays)} arrays of step {manifest.step}, run {manifest.run_id}")
    print("every chunk is whole in itself; that none is another step's can't be told without the old manifest")
    return 0


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def decay(text: str) -> float:
    try:
        return decay_of(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is no decay: a number from 0 to below 1") from error


@contextmanager
def bar(total: int | None, name: str) -> Iterator[inspect.Progress]:
    """A progress bar in bytes, on a terminal only."""
    with tqdm(total=total, desc=name, unit="B", unit_scale=True, unit_divisor=1024, disable=None) as shown:
        yield shown.update


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
