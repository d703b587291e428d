"""Time from the command to the first training step, against the bare imports and the bare model.

    python -m benchmarks.start

The program under test is ``launch/pretrain.py`` on one process, up to its first console line. The bare one imports
torch and DeepSpeed, builds the same model, and makes one step by hand. CPU seconds of each process, in turns.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models

from benchmarks.paired import describe_machine, median_ratio
from megatrain.data.shards.writer import DatasetWriter

ROOT = Path(__file__).parents[1]
VOCAB_SIZE, SEQ_LEN = 4096, 128
CONFIG = f"""
model:
  {{num_layers: 4, hidden_size: 128, attention: {{num_heads: 4}}, vocab_size: {VOCAB_SIZE}, max_seq_len: {SEQ_LEN}}}
precision: {{dtype: fp32}}
data: {{seq_len: {SEQ_LEN}}}
train: {{steps: 1, global_batch_size: 1}}
"""
BARE = """
import sys
from pathlib import Path
import torch, deepspeed
from megatrain.spec.derive import resolve_model
from megatrain.config.load import load_config
from megatrain.models.build import build_model
config = load_config([Path(sys.argv[1])]).config
model = build_model(resolve_model(config.model), 0)
optimizer = torch.optim.AdamW(model.parameters())
tokens = torch.randint(0, config.model.vocab_size, (1, config.data.seq_len))
model(tokens, tokens).backward()
optimizer.step()
print("step 1/1", flush=True)
"""


def make_data(folder: Path) -> Path:
    """A data set of random tokens."""
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB_SIZE)}, "t0")).to_str().encode()
    with DatasetWriter(
        folder, tokenizer=tokenizer, tokenizer_name="random", vocab_size=VOCAB_SIZE, eod_id=0, shard_tokens=10**6
    ) as writer:
        writer.add(np.random.default_rng(0).integers(0, VOCAB_SIZE, 10_000))
        writer.finish()
    return folder


def cpu_seconds_to_first_step(command: list[str]) -> float:
    """CPU seconds of the process when it prints its first step; it is then ended."""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 1/1"):
                seconds = _cpu_seconds(process.pid)
                process.kill()
                return seconds
    raise RuntimeError(f"{' '.join(command[:3])} made no step")


def _cpu_seconds(pid: int) -> float:
    """User and system time so far, as Linux keeps it."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = folder / "config.yaml"
        config.write_text(CONFIG)
        data = make_data(folder / "data")
        pretrain = [sys.executable, "launch/pretrain.py", "--config", str(config), "--data.train", str(data)]
        runs = iter(range(10**9))
        candidates: dict[str, Callable[[], list[str]]] = {
            "pretrain": lambda: [*pretrain, "--folder", str(folder / f"runs{next(runs)}")],
            "bare": lambda: [sys.executable, "-W", "ignore", "-c", BARE, str(config)],
        }
        seconds: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in range(options.repeats):
            for name, command in candidates.items():
                seconds[name].append(cpu_seconds_to_first_step(command()))
    print(describe_machine("torch", "deepspeed"))
    ours, theirs = seconds["pretrain"], seconds["bare"]
    print(
        f"to the first step: pretrain {statistics.median(ours):.2f} CPU s, bare {statistics.median(theirs):.2f} CPU s, "
        f"ratio {median_ratio(ours, theirs):.3f}"
    )


if __name__ == "__main__":
    main()
