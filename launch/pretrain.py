"""Trains a Transformer.

    deepspeed --num_gpus 4 launch/pretrain.py --config configs/run/quickstart.yaml --train.steps 200

Several config files are merged left to right; any field can be set on the command line by its dotted
name (docs/config.md). ``--print-config`` shows every value and where it comes from, and trains nothing; ``--dry-run``
does everything up to one step and one evaluation, tells the memory that they took, and leaves nothing behind.
"""

import argparse
import gc
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from megatrain.cluster.errors import LauncherError
from megatrain.cluster.identity import identity_from_environment, let_idle_threads_sleep, require_address
from megatrain.config.load import load_config
from megatrain.config.reading.problems import ConfigError
from megatrain.config.rules.check import check_ready_to_train
from megatrain.config.schema import ResolvedRun
from megatrain.config.show import format_config
from megatrain.console import run_config_tool
from megatrain.errors import STOPPED

SECONDS_TO_END_A_JOB = 5.0  # in which a launcher ends all ranks when one has failed


def main(arguments: list[str]) -> int:
    """The program; returns its exit code: 0 when all steps are done, 2 after a mistake, 74 where checkpoints can't be
    written or read, 75 when it was asked to stop and saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", type=Path, default=[], metavar="FILE", help="YAML files, merged")
    parser.add_argument("--print-config", action="store_true", help="show the resolved config and exit")
    parser.add_argument("--dry-run", action="store_true", help="make one step and one evaluation, and write nothing")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    try:
        return run_config_tool(parser, train, arguments, report)
    except SystemExit as stop:  # a signal's second time
        leave_at_once(stop.code)


def train(options: argparse.Namespace, overrides: list[str]) -> int:
    """Trains, or shows the config; returns the exit code."""
    config = resolved_config(options.config, overrides, options.print_config)
    if config is None:
        return 0
    let_idle_threads_sleep()
    gc.disable()  # looks through all that the imports make, again and again: a fifth of the start
    from megatrain.train.run import run  # imports torch: after the config's mistakes

    return 0 if run(config, options.dry_run) else STOPPED


def leave_at_once(code: Any) -> NoReturn:
    """Ends the process without its threads: the interpreter would wait until those of a save have written all, and
    those of process groups that a mistake left behind now and then abort it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def report(text: str, error: Exception) -> None:
    """Tells a mistake once: the ranks open the same files, so rank 0 speaks, and the launcher ends the others.

    A rank that is left alone met something that only its host has, and says so.
    """
    rank = 0 if isinstance(error, LauncherError) else identity_from_environment().rank
    if rank > 0:
        time.sleep(SECONDS_TO_END_A_JOB)
        text = f"rank {rank} on {socket.gethostname()}: {text}"
    print(f"error: {text}", file=sys.stderr)


def resolved_config(files: list[Path], overrides: list[str], print_only: bool) -> ResolvedRun | None:
    """The config of the run for the ranks that were started, or None when it was only to be shown."""
    identity = identity_from_environment()
    resolved = load_config(files, overrides, identity.world_size).with_derived(identity.world_size)
    if identity.rank == 0:
        for note in resolved.notes:
            print(f"# {note}" if print_only else f"NOTE: {note}", flush=True)
    if print_only:
        if identity.rank == 0:
            print(format_config(resolved), end="")
        return None
    require_address(identity)
    problems = check_ready_to_train(resolved.config, bool(files))
    if problems:
        raise ConfigError(resolved.with_origins(problems))
    return resolved.config


if __name__ == "__main__":
    code = main(sys.argv[1:])
    if code not in (0, STOPPED):
        leave_at_once(code)
    sys.exit(code)
