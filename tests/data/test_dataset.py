"""Data sets on disk: what is written is read, and what is damaged is refused."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatrain.data.errors import DataError
from megatrain.data.pool import Pool
from megatrain.data.shards.format import token_dtype
from megatrain.data.shards.reader import TokenDataset
from megatrain.data.shards.verify import find_problems
from megatrain.data.shards.writer import DatasetWriter
from tests.data.factory import byte_tokenizer, make_dataset, random_documents, write_documents

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("vocab_size", [300, 65_500, 65_536, 65_537, 200_000])
def test_round_trip(tmp_path, vocab_size):
    documents = [*random_documents(5000, vocab_size, 1), np.array([vocab_size - 1, 0])]
    dataset = TokenDataset.open(write_documents(tmp_path / "set", documents, vocab_size), vocab_size=vocab_size)
    stream = np.concatenate(documents)
    assert (dataset.num_tokens, dataset.num_documents) == (len(stream), len(documents))
    assert (dataset.vocab_size, dataset.eod_id) == (vocab_size, 0)
    assert dataset.tokenizer_path.read_bytes() == byte_tokenizer()
    assert len(dataset.manifest.shards) > 2
    assert dataset.manifest.dtype == token_dtype(vocab_size).name == ("uint16" if vocab_size <= 65_536 else "int32")
    for number, document in enumerate(documents):
        assert np.array_equal(dataset.document(number), document)
    for start, count in ((0, len(stream)), (0, 0), (len(stream), 0), (950, 3000), (len(stream) - 1, 1)):
        assert np.array_equal(dataset.tokens(start, count), stream[start : start + count])
    for start, count in ((-1, 2), (0, len(stream) + 1), (len(stream), 1)):
        with pytest.raises(IndexError):
            dataset.tokens(start, count)
    with pytest.raises(IndexError):
        dataset.document(len(documents))


def test_the_digest_names_the_content(tmp_path):
    first, again, other = (
        TokenDataset.open(make_dataset(tmp_path / name, seed=seed)) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first.digest == again.digest != other.digest


@pytest.mark.parametrize("name", ["tokens-00001.bin", "tokens-00001.idx"])
def test_missing_and_cut_files_are_named(tmp_path, name):
    """Defect 4: Megatron takes a .bin that is cut in half."""
    folder = make_dataset(tmp_path / "set")
    path = folder / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=rf"{name} has {len(content) // 2} bytes, expected {len(content)}"):
        TokenDataset.open(folder)
    path.unlink()
    with pytest.raises(DataError, match=rf"missing file of the data set: .*{name}"):
        TokenDataset.open(folder)


def test_a_shard_of_another_data_set_is_refused(tmp_path):
    folder, other = make_dataset(tmp_path / "set"), make_dataset(tmp_path / "other", num_tokens=777)
    for suffix in ("bin", "idx"):
        (other / f"tokens-00000.{suffix}").replace(folder / f"tokens-00000.{suffix}")
    with pytest.raises(DataError, match=r"tokens-00000.bin and its index have tokens 777, but manifest.json expects"):
        TokenDataset.open(folder)


def test_a_larger_vocabulary_is_refused(tmp_path):
    folder = make_dataset(tmp_path / "set", vocab_size=300)
    TokenDataset.open(folder, vocab_size=300)
    with pytest.raises(
        DataError, match=r"300 tokens \(bytes\), the model has 299: set model.vocab_size to at least 300"
    ):
        TokenDataset.open(folder, vocab_size=299)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=3), "has version 3, this megatrain reads 2: use a newer"),
        (lambda m: m.update(format="x"), "not the manifest of a data set"),
        (lambda m: m.pop("eod_id"), "damaged .*eod_id"),
        (lambda m: m.update(vocab_size="300"), "damaged .*vocab_size is '300'"),
        (lambda m: m["shards"][0].pop("tokens"), "damaged .*tokens"),
        (lambda m: m.update(shards=[]), "lists no shards"),
        (lambda m: m.update(shards=7), "damaged"),
    ],
)
def test_a_wrong_manifest_is_refused(tmp_path, change, message):
    path = make_dataset(tmp_path / "set", num_tokens=100) / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        TokenDataset.open(path.parent)
    path.write_text("{")
    with pytest.raises(DataError, match="damaged"):
        TokenDataset.open(path.parent)


def test_no_data_set(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "nothing").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("text")
    made = r"Make one by python data_tools/tokenize_text.py --input {} --tokenizer TOKENIZER --output FOLDER"
    for path, message in (
        (tmp_path / "texts", r"texts holds 1 \*.txt, not a data set, .*" + made.format(tmp_path / "texts")),
        (
            tmp_path / "texts" / "a.txt",
            "a.txt is a file, not a data set, .*" + made.format(tmp_path / "texts" / "a.txt"),
        ),
        (Path("data/elsewhere"), rf"no such folder \(looked for from {Path.cwd()}\)"),
    ):
        with pytest.raises(DataError, match=message):
            TokenDataset.open(path)
    with pytest.raises(DataError, match="no such folder"):
        TokenDataset.open(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"neither manifest.json nor .bin/.idx files"):
        TokenDataset.open(tmp_path / "nothing")


def test_an_index_of_something_else_is_refused(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"\1\0")
    (tmp_path / "x.idx").write_bytes(b"hello world")
    with pytest.warns(UserWarning, match="has no manifest"), pytest.raises(DataError, match="not a Megatron index"):
        TokenDataset.open(tmp_path)


def test_the_writer_refuses_what_is_not_its_own(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="is not a data set"):
        make_dataset(tmp_path)
    for tokens, message in (([], "without tokens"), ([3, 300], "id 300 is outside"), ([-1], "id -1 is outside")):
        with pytest.raises(DataError, match=message):
            write_documents(tmp_path / "set", [np.array(tokens, int)], 300)
    with pytest.raises(DataError, match="no documents"):
        write_documents(tmp_path / "set", [], 300)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


CALLS = ("fsync", "mkdir", "rename", "replace")


def write_until_killed(folder: Path, call: int) -> None:
    """Kills this process right before call number ``call`` to one of ``CALLS`` while it replaces the data set."""
    calls = 0

    def counted(original):
        def function(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        return function

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    make_dataset(folder, num_tokens=600, seed=2)


def kill_at_every_call(root: Path) -> None:
    """For each call of a write: over an older data set, and in an empty place."""
    for call in range(1, 1000):
        for kind in ("old", "new"):
            folder = root / f"{kind}-{call}" / "set"
            if kind == "old":
                make_dataset(folder, num_tokens=500, seed=1)
            child = os.fork()
            if child == 0:
                write_until_killed(folder, call)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
        if status == 0:
            return
        assert os.WTERMSIG(status) == signal.SIGKILL


def test_a_killed_writer_leaves_the_old_data_set_or_none(tmp_path):
    program = f"from {__name__} import *; kill_at_every_call(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", program, tmp_path], check=True, timeout=120, cwd=ROOT)
    places = sorted(tmp_path.iterdir())
    assert len(places) > 20
    seen = set()
    for place in places:
        folder = place / "set"
        if (place / ".set.replaced").exists() and not folder.exists():
            seen.add("moved aside")  # between two renames; the next writer puts it back
            DatasetWriter(folder, tokenizer=b"", tokenizer_name="", vocab_size=2, eod_id=0).__exit__(None, None, None)
        if folder.exists():
            assert list(find_problems(folder, Pool(None, 1))) == []
            seen.add(TokenDataset.open(folder).num_tokens)
        else:
            assert place.name.startswith("new")
            seen.add("none")
        make_dataset(folder, num_tokens=600, seed=2)
        assert [path.name for path in place.iterdir()] == ["set"]
    assert seen == {"moved aside", "none", 500, 600}
