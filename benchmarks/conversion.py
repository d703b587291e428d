"""Memory and time of a conversion with its proof, against the model's own size.

    python -m benchmarks.conversion

A Llama of random weights is imported from Hugging Face's format and exported again by ``launch/convert.py``, with and
without the proof. Memory is the peak of the process's own pages (RssAnon; pages of mapped files can be given up at any
time) less what a process holds that has only imported the same libraries.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.paired import describe_machine
from megatrain.convert.families.llama import LLAMA
from megatrain.convert.huggingface.config import config_from_model
from megatrain.convert.huggingface.model import CONFIG
from megatrain.convert.huggingface.safetensors_files import SafetensorsWriter
from megatrain.convert.table import their_shapes
from megatrain.spec.counts import block_parameters, num_parameters
from megatrain.spec.derive import resolve_model
from megatrain.spec.keys import nested
from megatrain.spec.schema import ModelConfig, ModelSpec

ROOT = Path(__file__).parents[1]
IMPORTS = "import torch; from transformers import LlamaForCausalLM; import megatrain.convert.run"


def make_model(folder: Path, layers: int, width: int, vocabulary: int) -> ModelSpec:
    """Writes a Hugging Face folder of random weights."""
    sizes = {"num_layers": layers, "hidden_size": width, "attention.num_heads": width // 64, "vocab_size": vocabulary}
    model = resolve_model(ModelConfig.model_validate(nested({"family": "llama", "max_seq_len": 4096, **sizes})))
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config_from_model(model)))
    shapes = {
        name: shape
        for entry, their in their_shapes(LLAMA.lines, model)
        for name, shape in zip(entry.theirs, their, strict=True)
    }
    writer = SafetensorsWriter(folder, torch.float32, shapes, shard_bytes=10**12)
    for name, shape in shapes.items():
        writer.write(name, torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape))
    writer.finish()
    return model


def watched(*command: str | Path) -> tuple[float, float]:
    """(seconds, peak of anonymous memory in bytes) of a Python process."""
    start, peak = time.perf_counter(), 0.0
    with subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, _anonymous(process.pid))
            time.sleep(0.01)
        if process.returncode:
            raise RuntimeError(f"{' '.join(map(str, command[:4]))} failed")
    return time.perf_counter() - start, peak


def _anonymous(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--proof-tokens", type=int, default=512)
    options = parser.parse_args()
    print(describe_machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder / "model", options.layers, options.width, options.vocabulary)
        whole, block = 4.0 * num_parameters(model), 4.0 * block_parameters(model, 0)
        table = 4.0 * options.vocabulary * options.width
        print(f"model {whole / 1e6:.0f} MB, a block {block / 1e6:.0f} MB, a vocabulary matrix {table / 1e6:.0f} MB")
        _, bare = watched("-c", IMPORTS)
        print(f"the imports alone: {bare / 1e6:.0f} MB")
        proof = ("--proof-tokens", str(options.proof_tokens))
        convert = "launch/convert.py"
        runs: dict[str, tuple[str | Path, ...]] = {
            "import, no proof": (folder / "model", folder / "a", "--to", "megatrain", "--no-verify"),
            "import and proof": (folder / "model", folder / "b", "--to", "megatrain", *proof),
            "export and proof": (folder / "b", folder / "c", "--to", "huggingface", *proof),
        }
        for what, arguments in runs.items():
            seconds, peak = watched(convert, *arguments)
            over = peak - bare
            print(f"{what}: {seconds:.1f} s, {over / 1e6:.0f} MB over the imports, {over / whole:.2f} of the model")


if __name__ == "__main__":
    main()
