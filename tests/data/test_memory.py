"""The memory that tokenising takes does not depend on the input."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatrain.data.reader import TokenDataset
from tests.data.factory import byte_tokenizer

ROOT = Path(__file__).parents[2]
MEASURED = """
import sys
from data_tools import tokenize_text
assert tokenize_text.main(sys.argv[1:]) == 0
status = open("/proc/self/status").read()
print(status.partition("VmHWM:")[2].split()[0])
"""


def peak_memory(folder: Path, megabytes: int, backend: str) -> float:
    """MiB that tokenising one document of words, of so many MB, takes at most."""
    text = " ".join(f"word {number * 7919 % 100_000} of many\n" for number in range(100_000))[:1_000_000]
    with open(folder / "one.txt", "w") as file:
        for _ in range(megabytes):
            file.write(text)
    (folder / "tokenizer.json").write_bytes(byte_tokenizer())
    words = ["--input", folder / "one.txt", "--tokenizer", folder / "tokenizer.json", "--output", folder / "set"]
    words += ["--workers", 1, "--backend", backend, "--overwrite"]
    command = [sys.executable, "-c", MEASURED, *map(str, words)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    dataset = TokenDataset.open(folder / "set")
    assert dataset.num_documents == 1
    assert dataset.num_tokens == megabytes * 1_000_000 + 1
    return int(ran.stdout.split()[-1]) / 1024


@pytest.mark.parametrize(
    ("megabytes", "backend"),
    [
        (6, "tokenizers"),
        pytest.param(200, "tokenizers", marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
        pytest.param(200, "auto", marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
    ],
)
def test_one_large_document(tmp_path, megabytes, backend):
    few, many = (peak_memory(tmp_path, size, backend) for size in (1, megabytes))
    print(f"{few:.0f} MiB for 1 MB, {many:.0f} MiB for {megabytes} MB")
    # the pieces of 1 MiB are alike; what is freed between them is not always given back to the system
    assert many - few < 32
