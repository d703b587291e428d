"""The memory that tokenising takes does not depend on the input."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatrain.data.corpus import chunks
from megatrain.data.shards.reader import TokenDataset
from tests.data.factory import byte_tokenizer

ROOT = Path(__file__).parents[2]
SLOW = [pytest.mark.slow, pytest.mark.timeout(1200)]
MEASURED = """
import sys
from data_tools import tokenize_text
from megatrain.data.corpus import chunks
from megatrain.data.corpus import encode
chunks.CHUNK_BYTES = chunks.PIECE_BYTES = encode.PIECE_BYTES = int(sys.argv[1])
for words in sys.argv[2], sys.argv[3]:
    assert tokenize_text.main(words.split("|")) == 0
    print("peak", open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
"""


def peak_memory(folder: Path, megabytes: tuple[int, int], piece_bytes: int, backend: str) -> list[float]:
    """MiB that one process has had at most after it has tokenised one document of words, and after a second one."""
    text = " ".join(f"word {number * 7919 % 100_000} of many\n" for number in range(100_000))[:1_000_000]
    (folder / "tokenizer.json").write_bytes(byte_tokenizer())
    runs = []
    for size in megabytes:
        with open(folder / f"{size}.txt", "w") as file:
            for _ in range(size):
                file.write(text)
        words = ["--input", folder / f"{size}.txt", "--tokenizer", folder / "tokenizer.json", "--workers", 1]
        runs.append("|".join(map(str, [*words, "--output", folder / str(size), "--backend", backend])))
    command = [sys.executable, "-c", MEASURED, str(piece_bytes), *runs]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    for size in megabytes:
        dataset = TokenDataset.open(folder / str(size))
        assert dataset.num_documents == 1
        assert dataset.num_tokens == size * 1_000_000 + 1
    return [int(line.split()[1]) / 1024 for line in ran.stdout.splitlines() if line.startswith("peak")]


@pytest.mark.parametrize(
    ("megabytes", "piece_bytes", "backend", "growth"),
    [
        # 16 pieces, then 123 more. Measured: at most 3 MiB, as pieces vary; the ids of 7 MB, if kept, are 14 MiB
        pytest.param((1, 8), 1 << 16, "tokenizers", 6, id="small-pieces"),
        # as it is used: from the fourth piece on the peak is 333 to 349 MiB, by what the allocator gives back when
        pytest.param((4, 200), chunks.PIECE_BYTES, "tokenizers", 32, id="tokenizers", marks=SLOW),
        pytest.param((4, 200), chunks.PIECE_BYTES, "auto", 32, id="auto", marks=SLOW),
    ],
)
def test_one_large_document(tmp_path, megabytes, piece_bytes, backend, growth):
    few, many = peak_memory(tmp_path, megabytes, piece_bytes, backend)
    print(f"{few:.0f} MiB after {megabytes[0]} MB, {many:.0f} MiB after {megabytes[1]} MB")
    assert many - few < growth
