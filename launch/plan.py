"""Answers questions about a config without running it.

    python launch/plan.py --schedule --world-size 4 --config configs/parallel/pp2_interleaved.yaml
    python launch/plan.py --schedule --png schedule.png --world-size 4 --parallel.pp 4 --train.global_batch_size 16
    python launch/plan.py --compat zero_stage=1,pp=4,pp_schedule=zbv

``--schedule`` takes config files and dotted overrides like pretrain.py. It draws what each pipeline rank does in a
step, if a forward, an input gradient and a weight gradient take one unit of time each.

``--compat`` says whether features go together (docs/compatibility.md names them all); the exit status is 0 where they
do, and 1 where they do not.
"""

import argparse
import sys
from pathlib import Path

from megatrain.config.derive import grad_accum_steps, num_ranks
from megatrain.config.load import load_config
from megatrain.config.reading.problems import ConfigError, Problem
from megatrain.config.rules.combine import read_features, refusals_of, shown
from megatrain.config.schema import ResolvedRun
from megatrain.console import run_config_tool
from megatrain.disk.target import require_target


def main(arguments: list[str]) -> int:
    """The program; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", type=Path, default=[], metavar="FILE", help="YAML files, merged")
    parser.add_argument("--world-size", type=int, help="ranks of the run; default: as many as the config asks for")
    parser.add_argument("--schedule", action="store_true", help="draw the pipeline schedule")
    parser.add_argument("--png", type=Path, metavar="FILE", help="with --schedule: also as a picture")
    parser.add_argument("--overwrite", action="store_true", help="replace an older picture")
    parser.add_argument("--compat", metavar="A=X,B=Y", help="whether these features go together, and why not")

    def body(options: argparse.Namespace, overrides: list[str]) -> int:
        if options.schedule == (options.compat is not None):
            parser.error(
                "give one of --schedule, which draws what the pipeline of a config does, and --compat A=X,B=Y, which "
                "says whether features go together; `launch/pretrain.py --config … --print-config` shows a config"
            )
        if (options.png is not None and not options.schedule) or (options.overwrite and options.png is None):
            parser.error("--png FILE goes with --schedule, and --overwrite with --png FILE")
        if options.compat is not None:
            return answer_compatibility(options.compat, overrides)
        if options.png is not None:
            require_target(options.png, options.overwrite)
        print_schedule(resolved_config(options.config, overrides, options.world_size), options.png)
        return 0

    return run_config_tool(parser, body, arguments)


def resolved_config(files: list[Path], overrides: list[str], world_size: int | None) -> ResolvedRun:
    """The config as ``world_size`` ranks would run it; by default as many as it asks for."""
    if world_size is None:
        world_size = num_ranks(load_config(files, overrides).config.parallel)
    return load_config(files, overrides, world_size).with_derived(world_size).config


def answer_compatibility(features: str, overrides: list[str]) -> int:
    """Says whether ``features`` go together; returns 0 where they do, 1 where not."""
    if overrides:
        cure = "write features after --compat, as A=X,B=Y"
        raise ConfigError([Problem(overrides[0], None, "is no part of a question about features", "nothing", cure)])
    asked = read_features(features)
    refusals = refusals_of(asked)
    words = ", ".join(shown(name, value) for name, value in asked.items())
    print("\n".join([f"{'refused' if refusals else 'allowed'}: {words}", *refusals]))
    return 1 if refusals else 0


def print_schedule(config: ResolvedRun, png: Path | None) -> None:
    """Prints the timeline of a step, and draws it into ``png``."""
    if config.parallel.pp == 1:
        cure = "set parallel.pp to 2 or more"
        raise ConfigError([Problem("parallel.pp", 1, "makes no pipeline: there is no schedule to draw", "2…", cure)])
    from megatrain.plan.draw import as_png, as_text  # imports torch: after the config's mistakes
    from megatrain.plan.pipeline import timeline

    drawn = timeline(config.parallel, grad_accum_steps(config))
    print(as_text(drawn))
    if png is not None:
        as_png(drawn, png)
        print(f"wrote {png}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
