"""Continues a text with a trained model.

python launch/generate.py --run runs/quickstart --prompt "def main("
"""

import argparse
import math
import sys
from pathlib import Path

from megatrain.console import run_tool


def main(arguments: list[str]) -> int:
    """The program; returns its exit code."""
    parser = _parser()

    def body(options: argparse.Namespace) -> None:
        if options.run is None and options.checkpoint is None:
            parser.error("--run or --checkpoint says which model: a run's folder, or a step-… folder")
        print(continued(options))

    return run_tool(parser, body, arguments)


def continued(options: argparse.Namespace) -> str:
    """The prompt and what the model makes of it."""
    from megatrain.checkpoint.store.arrays import CheckpointReader
    from megatrain.checkpoint.store.folder import checkpoint_at
    from megatrain.inference.generate import generate, load_model, require_room
    from megatrain.inference.prompt import Speech

    checkpoint = checkpoint_at(options.checkpoint or options.run)
    reader = CheckpointReader(checkpoint)
    speech = Speech.of(reader, options.tokenizer)
    prompt = speech.encode(options.prompt)
    require_room(reader, prompt)
    new = generate(
        load_model(checkpoint), prompt, options.max_new_tokens, options.temperature, options.seed, speech.eod_id
    )
    return options.prompt + speech.decode(prompt, list(new))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="run folder, whose newest checkpoint is used, or a step-… folder")
    parser.add_argument("--checkpoint", type=Path, help="a step-… folder, which counts before --run")
    about = "tokenizer.json or its folder; default: that of the checkpoint"
    parser.add_argument("--tokenizer", type=Path, help=about)
    parser.add_argument("--prompt", default="\n", help="text to go on with; empty: the beginning of a document")
    parser.add_argument("--max-new-tokens", type=_count, default=100)
    parser.add_argument("--temperature", type=_temperature, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--seed", type=_seed, default=0)
    return parser


def _count(text: str) -> int:
    return _whole(text, 1, 2**31)


def _seed(text: str) -> int:
    return _whole(text, 0, 2**63)


def _whole(text: str, first: int, end: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = first - 1
    if not first <= number < end:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a whole number from {first} on and below {end}")
    return number


def _temperature(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a number from 0 on")
    return number


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
