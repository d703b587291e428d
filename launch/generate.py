"""Continues a text with a trained model.

python launch/generate.py --run runs/quickstart --prompt "def main("
"""

import argparse
import sys
from pathlib import Path

from megatrain.checkpoint.errors import CheckpointError
from megatrain.checkpoint.folder import checkpoint_at
from megatrain.config.load import from_yaml


def main(arguments: list[str]) -> int:
    """The program; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="run folder; its newest checkpoint is used")
    parser.add_argument("--checkpoint", type=Path, help="this checkpoint instead")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json; default: the run's")
    parser.add_argument("--prompt", default="\n")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    options = parser.parse_args(arguments)
    try:
        print(continued(options))
        return 0
    except (CheckpointError, OSError) as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def continued(options: argparse.Namespace) -> str:
    """The prompt and what the model makes of it."""
    from tokenizers import Tokenizer

    from megatrain.train.generate import generate, load_model

    checkpoint = checkpoint_at(options.checkpoint or options.run)
    data = from_yaml((options.run / "config.yaml").read_text(encoding="utf-8")).data
    first = next(iter(data.train.values()))
    path = options.tokenizer or Path(data.tokenizer or Path(first.path) / "tokenizer.json")
    tokenizer = Tokenizer.from_file(str(path))
    prompt = tokenizer.encode(options.prompt).ids
    model = load_model(checkpoint)
    new = generate(
        model,
        prompt,
        options.max_new_tokens,
        options.temperature,
        options.seed,
        tokenizer.token_to_id("<|endoftext|>"),
    )
    return options.prompt + tokenizer.decode(list(new))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
