"""Runs the first steps of a config in two layouts on the same batches, and names the first tensor that differs.

    python launch/parity.py --config configs/model/llama_tiny.yaml --layout tp=2,pp=2 --against tp=1

A layout is a list of fields of the section `parallel`; `model`, `train` and the rest come from config files and
dotted overrides, as for pretrain.py. Without data.train the batches are random. Compared are activations at the borders
of blocks, losses, gradients and their norms, moments, updates, balance biases and skipped steps, each in the band that
rounding explains: the layout to trust runs four more times, with noise of that size (docs/parity.md). Exit code: 0
equal, 1 different, 2 a config that cannot run.
"""

import argparse
import os
import sys
from pathlib import Path

from megatrain.cluster.identity import let_idle_threads_sleep
from megatrain.config.derive import num_ranks
from megatrain.config.load import load_config
from megatrain.config.schema import ResolvedRun
from megatrain.console import run_config_tool


def main(arguments: list[str]) -> int:
    """The program; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", type=Path, default=[], metavar="FILE", help="YAML files, merged")
    parser.add_argument("--layout", required=True, metavar="FIELD=VALUE,…", help="the layout in question")
    parser.add_argument("--against", default="tp=1", metavar="FIELD=VALUE,…", help="the layout to trust")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run")
    parser.add_argument("--all", action="store_true", help="print all that differs, not only the first")
    return run_config_tool(parser, compare, arguments)


def compare(options: argparse.Namespace, overrides: list[str]) -> int:
    """Runs the config in both layouts; returns the exit code."""
    ours, reference = (layout_config(options.config, overrides, layout) for layout in (options.layout, options.against))
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return report(ours, reference, options.all)


def layout_config(files: list[Path], overrides: list[str], layout: str) -> ResolvedRun:
    """The config in a layout, for as many ranks as it takes.

    Raises:
        ConfigError: as for a run.
    """
    fields = [f"--parallel.{entry.strip()}" for entry in layout.split(",") if entry.strip()]
    base = ["--parallel.dp=1"] if "dp=" not in layout else []
    every = [*overrides, *base, *fields]
    world_size = num_ranks(load_config(files, every).config.parallel)
    return load_config(files, every, world_size).with_derived(world_size).config


def report(ours: ResolvedRun, reference: ResolvedRun, everything: bool) -> int:
    """Runs both, prints what differs; returns the exit code."""
    let_idle_threads_sleep()
    from megatrain.parity.run import compare_layouts  # imports torch: after the config's mistakes

    result = compare_layouts(ours, reference)
    if not result.differences:
        print(f"equal: {result.num_tensors} tensors, loss {result.loss:.6f} on {result.num_ranks} ranks")
        return 0
    print(f"first difference: {result.differences[0]}")
    for difference in result.differences[1:] if everything else []:
        print(difference)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
