"""A program's options beside dotted overrides of the config."""

import argparse
import difflib
import re
from collections.abc import Sequence

from megatrain.config.reading.problems import ConfigError, Problem
from megatrain.config.reading.source import COMMAND_LINE


def options_and_overrides(
    parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """What ``parser`` knows of ``arguments``, and the rest: overrides, as ``load.load_config`` reads them.

    Raises:
        ConfigError: an argument that is no field is nearly one of the program's options.
    """
    options, overrides = parser.parse_known_args(arguments)
    known = re.findall(r"--[a-z][\w-]*", parser.format_usage())
    problems = []
    for argument in overrides:
        written = argument.partition("=")[0]
        if not argument.startswith("--") or "." in written:
            continue
        near = difflib.get_close_matches(written.lower().replace("_", "-"), known, 1, 0.8)
        if near:
            text, cure = (
                "is no option of this program",
                f"did you mean {near[0]}? fields are set as `--section.key value`",
            )
            problems.append(Problem("argument", written, text, ", ".join(known), cure, COMMAND_LINE))
    if problems:
        raise ConfigError(problems)
    return options, overrides
