"""A mixture of experts through the real launcher, on real text: three and four axes follow one process."""

import json
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.launch.test_pretrain import deepspeed, run

SOURCES = Path(sysconfig.get_paths()["stdlib"])
CONFIG = """
model: {num_layers: 4, hidden_size: 64, attention: {num_heads: 4, num_kv_heads: 2}, feed_forward: {hidden_size: 128},
        vocab_size: 512, max_seq_len: 64, router: {balance_rate: 1e-3},
        experts: {num_dense_layers: 1, num_experts: 8, per_token: 2, num_shared: 1, hidden_size: 32}}
precision: {dtype: fp32}
optimizer: {lr: 3e-3}
schedule: {warmup_steps: 3}
train: {steps: 12, global_batch_size: 16, micro_batch_size: 2, log_every: 1, eval_batches: 2}
"""
LAYOUTS = {
    "pp2-dp2-ep2": ["--parallel.pp", "2", "--parallel.ep", "2", "--parallel.dp", "2"],
    "tp2-pp2-dp2-ep2": [
        *("--parallel.tp", "2", "--parallel.pp", "2", "--parallel.ep", "2", "--parallel.dp", "2"),
        *("--parallel.sequence_parallel", "true"),
    ],
}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Config and data: sources of Python's standard library, with a tokenizer trained on them."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "moe.yaml").write_text(CONFIG)
    texts = ["--input", str(SOURCES / "json"), str(SOURCES / "email"), "--suffix", ".py"]
    tokenizer, data = str(folder / "tokenizer.json"), str(folder / "data")
    for command in (
        ["data_tools/train_tokenizer.py", *texts, "--output", tokenizer, "--vocab-size", "512"],
        ["data_tools/tokenize_text.py", *texts, "--tokenizer", tokenizer, "--output", data],
    ):
        result = run(sys.executable, *command)
        assert result.returncode == 0, result.stdout + result.stderr
    return ["--config", str(folder / "moe.yaml"), "--data.train", data, "--data.seq_len", "64"]


def train(folder: Path, num_ranks: int, arguments: list[str]) -> list[dict]:
    result = deepspeed(num_ranks, *arguments, "--folder", str(folder))
    assert result.returncode == 0, result.stdout + result.stderr
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == "step"]


@pytest.mark.slow  # a run of 8 ranks takes a minute
def test_three_and_four_axes_follow_one_process(tmp_path: Path, arguments: list[str]) -> None:
    alone = train(tmp_path / "alone", 1, arguments)
    assert len(alone) == 12 and alone[-1]["loss"] < alone[0]["loss"] - 0.3, "it learns"
    assert set(alone[0]["routing"]) == {"layers.1", "layers.2", "layers.3"}
    for name, layout in LAYOUTS.items():
        rows = train(tmp_path / name, 4 if "tp" not in name else 8, [*arguments, *layout])
        for expected, row in zip(alone, rows, strict=True):
            # FP32 adds in another order; where two experts score alike to the last bits, a token may take the other
            assert row["loss"] == pytest.approx(expected["loss"], rel=2e-4), f"{name}, step {row['step']}"
            for layer, values in expected["routing"].items():
                assert row["routing"][layer]["load"] == pytest.approx(values["load"], abs=2e-3)
                assert row["routing"][layer]["entropy"] == pytest.approx(values["entropy"], rel=1e-3)
