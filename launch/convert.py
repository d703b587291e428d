"""Converts a model from one format to another and proves that it is still the same model.

python launch/convert.py meta-llama/ runs/llama --to megatrain
python launch/convert.py runs/llama/checkpoints --to huggingface exported/
"""

import argparse
import sys
from pathlib import Path

from megatrain.console import run_tool


def main(arguments: list[str]) -> int:
    """The program; returns its exit code: 0 done, 2 not possible, 3 the proof failed."""
    return run_tool(_parser(), lambda options: print(converted(options)), arguments)


def converted(options: argparse.Namespace) -> str:
    """Converts; returns what to tell."""
    from megatrain.convert.formats import Choices
    from megatrain.convert.huggingface.safetensors_files import DTYPES
    from megatrain.convert.run import Request, convert

    choices = Choices(
        dtype=DTYPES[options.dtype],
        shard_bytes=int(options.shard_gb * 10**9),
        vocab_multiple=options.vocab_multiple,
        tokenizer=options.tokenizer,
        model_file=options.model,
        trust_pickle=options.trust_pickle,
        zero_ranks=options.zero_ranks,
        tensor_ranks=options.tensor_ranks,
        spread_experts=options.spread_experts,
        weights_only=options.weights_only,
    )
    request = Request(options.source, options.target, options.to, not options.no_verify, options.proof_tokens, choices)
    record = convert(request)
    text = f"{options.target}: {record['from']} -> {record['to']}, {record['status']}"
    if record["proof"]:
        proof = record["proof"]
        rounded = f" once {proof['num_rounded']} were rounded to {record['dtype']}" if proof["num_rounded"] else ""
        text += (
            f": {proof['num_tensors']} tensors bit-equal{rounded}, logits of {proof['num_tokens']} tokens differ by at "
            f"most {proof['max_difference']:.1e}"
        )
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a folder in any of the formats")
    parser.add_argument("target", type=Path, help="a folder that does not exist yet")
    parser.add_argument(
        "--to",
        required=True,
        choices=["megatrain", "huggingface", "megatron", "deepspeed", "universal"],
        help="format of the target",
    )
    add = parser.add_argument
    about = "of the weights for Hugging Face; training states are always float32"
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help=about)
    add("--shard-gb", type=_above_zero, default=5.0, help="largest safetensors file in 10^9 bytes")
    about = "pad an imported vocabulary to a multiple of N, so that tensor ranks can share it"
    add("--vocab-multiple", type=_count, default=1, metavar="N", help=about)
    about = "tokenizer.json or a folder with a tokenizer; default: what lies beside the source"
    add("--tokenizer", type=Path, help=about)
    about = "config file that says what model the source is, where its format does not (default: its model.yaml)"
    add("--model", type=Path, help=about)
    about = "open a source that is a pickle, which can run any code; only for files from people you trust"
    add("--trust-pickle", action="store_true", help=about)
    about = "longest sequence of the proof, which both models run in FP32"
    add("--proof-tokens", type=_count, default=2048, metavar="S", help=about)
    add(
        "--zero-ranks",
        type=_count,
        default=1,
        metavar="N",
        help="data-parallel ranks of a DeepSpeed checkpoint to write",
    )
    add("--tensor-ranks", type=_count, default=1, metavar="N", help="tensor ranks of a DeepSpeed checkpoint to write")
    about = "write a Megatron-core mixture's optimizer for runs with --expert-model-parallel-size above 1, not for 1"
    add("--spread-experts", action="store_true", help=about)
    add("--weights-only", action="store_true", help="leave the optimizer's states behind")
    add("--no-verify", action="store_true", help="skip the proof; the target's record says so")
    return parser


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a whole number from 1 on")
    return int(text)


def _above_zero(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 1e-9 <= number < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a number above 0")
    return number


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
