"""Tokenising gives the same bytes however it is run: any number of processes or MPI ranks, killed or not."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_tools import tokenize_text
from megatrain.data.corpus import chunks
from megatrain.data.errors import DataError
from megatrain.data.pool import Pool
from megatrain.data.shards import shuffle
from megatrain.data.shards.manifest import Manifest
from megatrain.data.shards.reader import TokenDataset
from megatrain.data.shards.verify import find_problems
from megatrain.data.shards.writer import BAD_RECORDS, DatasetWriter
from tests.data.factory import byte_tokenizer, make_dataset

ROOT = Path(__file__).parents[2]
NAMES = ("train", "validation")


def make_inputs(folder: Path, num_documents: int = 2000) -> None:
    """JSON lines with some bad records, a text of many pieces, and a tokenizer."""
    generator = random.Random(1)
    words = ["the", "a", "naïve", "<|endoftext|>", "日本", "run", "\n"]
    with open(folder / "a.jsonl", "w", encoding="utf-8") as file:
        for number in range(num_documents):
            text = " ".join(generator.choices(words, k=generator.randrange(60)))
            file.write(json.dumps({"text": text}) + "\n" if number % 100 else "broken\n")
    (folder / "b.txt").write_text(" ".join(generator.choices(words, k=25_000)))
    (folder / "c.txt").write_text("last of all")
    (folder / "t.json").write_bytes(byte_tokenizer())


def options(inputs: Path, output: Path, *more: object) -> list[str]:
    words = ["--input", inputs, "--tokenizer", inputs / "t.json", "--bad", "skip", "--shard-tokens", 50_000]
    words += ["--output", output / "train", "--validation-output", output / "validation", "--validation-share", 0.1]
    return [str(word) for word in [*words, *more]]


def small_pieces() -> None:
    chunks.CHUNK_BYTES, chunks.PIECE_BYTES, chunks._CUT_SEARCH = 10_000, 10_000, 1000


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def expected(inputs, tmp_path_factory):
    """What one process writes."""
    folder = tmp_path_factory.mktemp("expected")
    assert tokenize_text.main(options(inputs, folder, "--workers", 1)) == 0
    return content_of(folder)


def kill_and_resume(inputs: Path, output: Path, kills: int, workers: int) -> None:
    """Kills runs at random moments; every one that comes to its end must have written the same bytes.

    The moments follow the machine's speed, which others change: later after a kill before the first note, earlier
    after a run that came to its end.
    """
    small_pieces()
    whole = output / "whole"
    begun = time.monotonic()
    assert run_child(options(inputs, whole, "--workers", workers), None) == 0
    latest = time.monotonic() - begun
    reference = content_of(whole)
    generator = random.Random(7)
    done = resumed = 0
    folder = output / "killed"
    note = folder / ".train.progress.json"
    while done < kills or resumed < kills // 3:
        resumed += note.exists()
        status = run_child(options(inputs, folder, "--workers", workers), generator.uniform(0, latest))
        if status == 0:
            assert content_of(folder) == reference
            shutil.rmtree(folder)
            latest *= 0.9
        else:
            assert os.WTERMSIG(status) == signal.SIGKILL
            done += 1
            latest *= 1 if note.exists() else 1.1
    assert run_child(options(inputs, folder, "--workers", workers), None) == 0
    assert content_of(folder) == reference
    print(f"{done} kills, {resumed} runs went on from a note")


def run_child(words: list[str], killed_after: float | None) -> int:
    child = os.fork()
    if child == 0:
        code = tokenize_text.main(words)
        os._exit(code)
    if killed_after is not None:
        time.sleep(killed_after)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def test_killed_at_fifty_moments_it_goes_on_and_writes_the_same_bytes(inputs, tmp_path):
    program = f"from {__name__} import *; kill_and_resume(Path(sys.argv[1]), Path(sys.argv[2]), 50, 1)"
    subprocess.run([sys.executable, "-c", program, inputs, tmp_path], check=True, timeout=250, cwd=ROOT)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_with_two_workers(inputs, tmp_path):
    program = f"from {__name__} import *; kill_and_resume(Path(sys.argv[1]), Path(sys.argv[2]), 50, 2)"
    program = f"if __name__ == '__main__':\n    {program}"  # workers import the program anew
    subprocess.run([sys.executable, "-c", program, inputs, tmp_path], check=True, timeout=1100, cwd=ROOT)


def test_what_is_written_is_what_was_read(inputs, expected, tmp_path):
    for name in NAMES:
        (tmp_path / name).mkdir()
    for name, content in expected.items():
        (tmp_path / name).write_bytes(content)
    for name, num_shards in (("train", 5), ("validation", 1)):
        assert list(find_problems(tmp_path / name, Pool(None, 1))) == []
        dataset = TokenDataset.open(tmp_path / name)
        assert len(dataset.manifest.shards) >= num_shards
        assert dataset.manifest.lineage["bad_records"] == expected[f"train/{BAD_RECORDS}"].count(b"\n")
    listed = expected[f"train/{BAD_RECORDS}"].decode().replace(f"{inputs}/", "").splitlines()
    assert listed[0].startswith("a.jsonl:1: broken JSON")
    assert sum("broken JSON" in line for line in listed) == 20
    inputs_named = [Path(entry["path"]).name for entry in Manifest.read(tmp_path / "train").lineage["inputs"]]
    assert inputs_named == ["a.jsonl", "b.txt", "c.txt"]


@pytest.mark.parametrize("workers", [2, 4])
def test_the_number_of_processes_changes_no_byte(inputs, expected, tmp_path, monkeypatch, workers):
    for name, value in (("CHUNK_BYTES", 50_000), ("PIECE_BYTES", 70_000), ("_CUT_SEARCH", 1000)):
        monkeypatch.setattr(chunks, name, value)  # nor does the size of what is read at once
    assert tokenize_text.main(options(inputs, tmp_path, "--workers", workers)) == 0
    assert content_of(tmp_path) == expected


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun (Debian: openmpi-bin)")
@pytest.mark.parametrize("ranks", [1, 3, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (2, 4))])
def test_the_number_of_mpi_ranks_changes_no_byte(inputs, expected, tmp_path, ranks):
    ran = mpirun(ranks, options(inputs, tmp_path))
    assert ran.returncode == 0, ran.stderr
    assert content_of(tmp_path) == expected
    if ranks == 3:
        ran = mpirun(ranks, [word if word != "skip" else "fail" for word in options(inputs, tmp_path / "other")])
        assert ran.returncode == 2
        assert ran.stderr.count("error: ") == 1
        assert "a.jsonl:1: broken JSON" in ran.stderr


def mpirun(ranks: int, words: list[str]) -> subprocess.CompletedProcess:
    program = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", str(ranks), sys.executable]
    program += ["data_tools/tokenize_text.py", *words]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(program, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


def test_shuffled_documents_are_the_same_documents(inputs, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(shuffle, "_BUCKET_TOKENS", 20_000)

    def documents(folder):
        assert list(find_problems(folder, Pool(None, 1))) == []
        dataset = TokenDataset.open(folder)
        return [dataset.document(number).tobytes() for number in range(dataset.num_documents)]

    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert tokenize_text.main(options(inputs, tmp_path / name, "--shuffle-seed", seed)) == 0
    assert content_of(tmp_path / "a") == content_of(tmp_path / "b")
    (tmp_path / "plain").mkdir()
    assert tokenize_text.main(options(inputs, tmp_path / "plain")) == 0
    for name in NAMES:
        plain, *shuffled = (documents(tmp_path / run / name) for run in ("plain", "a", "c"))
        assert shuffled[0] != shuffled[1] != plain
        assert sorted(shuffled[0]) == sorted(shuffled[1]) == sorted(plain)
    train = documents(tmp_path / "a" / "train")
    place = {document: number for number, document in enumerate(documents(tmp_path / "plain" / "train"))}
    places = np.array([place[document] for document in train])
    assert abs(np.corrcoef(places, np.arange(len(places)))[0, 1]) < 0.1


def test_standard_input_as_a_process(tmp_path):
    make_inputs(tmp_path, 200)
    content = (tmp_path / "a.jsonl").read_bytes()
    words = ["--input", "-", "--tokenizer", str(tmp_path / "t.json"), "--bad", "skip", "--output"]
    program = [sys.executable, "data_tools/tokenize_text.py", *words]
    env = {"PYTHONPATH": str(ROOT)}
    for name in ("a", "b"):
        ran = subprocess.run([*program, tmp_path / name], cwd=ROOT, env=env, input=content, capture_output=True)
        assert ran.returncode == 0, ran.stderr
    assert content_of(tmp_path / "a") == content_of(tmp_path / "b")
    assert len(Manifest.read(tmp_path / "a").made_from["stdin_sha256"]) == 64
    ran = subprocess.run([*program, tmp_path / "a"], cwd=ROOT, env=env, input=content, capture_output=True)
    assert ran.returncode == 2
    assert b"standard input may differ" in ran.stderr


def test_two_writers_of_one_folder(tmp_path):
    def writer():
        return DatasetWriter(tmp_path / "set", tokenizer=b"", tokenizer_name="", vocab_size=9, eod_id=0)

    with writer() as first:
        with pytest.raises(DataError, match="another process is writing"):
            writer()
        first.add(np.array([1, 0]))
        first.finish()
        with writer() as second:  # the first has let go by finishing
            second.add(np.array([2, 0]))
            second.finish()
    assert TokenDataset.open(tmp_path / "set").document(0).tolist() == [2, 0]


def test_a_document_in_pieces_can_be_taken_back(tmp_path):
    documents = [np.full(700_000, 5), np.full(900_000, 6), np.array([7, 0])]  # of more than a block

    def write(folder, with_pieces):
        with DatasetWriter(folder, tokenizer=b"", tokenizer_name="", vocab_size=9, eod_id=0) as writer:
            writer.add(documents[0])
            if with_pieces:
                for _ in range(3):
                    writer.add_piece(np.full(800_000, 8), ends=False)
                writer.drop_pieces()
                writer.add_piece(documents[1][:1], ends=False)
                writer.add_piece(documents[1][1:], ends=True)
            else:
                writer.add(documents[1])
            writer.add(documents[2])
            return writer.finish()

    assert write(tmp_path / "a", True) == write(tmp_path / "b", False)
    assert content_of(tmp_path / "a") == content_of(tmp_path / "b")
    assert list(find_problems(tmp_path / "a", Pool(None, 1))) == []
    make_dataset(tmp_path / "c")
