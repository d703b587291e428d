"""Reads every byte of data sets and compares digests, block CRCs, counts and the highest token ids.

Prints what is wrong, and returns 1 if anything is.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatrain.console import run_tool
from megatrain.data.pool import num_cores, open_pool
from megatrain.data.shards.verify import find_problems


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; returns the exit code: 0, 1 if a data set is damaged, 2 after an error message."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="+", type=Path, help="data sets")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: %(default)s)")
    return run_tool(parser, verify, argv)


def verify(arguments: argparse.Namespace) -> int:
    """Checks each data set; returns 1 if one is damaged."""
    num_problems = 0
    with open_pool(max(1, min(arguments.workers, num_cores()))) as pool:
        for folder in arguments.folder:
            before = num_problems
            for problem in find_problems(folder, pool):
                print(problem)
                num_problems += 1
            if num_problems == before:
                print(f"{folder}: every byte is as it was written")
    return int(num_problems > 0)


if __name__ == "__main__":
    sys.exit(main())
