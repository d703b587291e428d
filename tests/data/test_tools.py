"""The command-line tools, in this process and as scripts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer

from data_tools import inspect_shards, tokenize_text, train_tokenizer
from megatrain.data.corpus import chunks
from megatrain.data.shards.reader import TokenDataset
from tests.data.factory import byte_tokenizer, make_dataset

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(byte_tokenizer())
    return path


def run(tool, *words):
    return tool.main([str(word) for word in words])


def texts_of(folder):
    dataset = TokenDataset.open(folder)
    tokenizer = Tokenizer.from_file(str(dataset.tokenizer_path))
    documents = [dataset.document(number).tolist() for number in range(dataset.num_documents)]
    assert all(document[-1] == dataset.eod_id for document in documents)
    assert all(dataset.eod_id not in document[:-1] for document in documents)
    return [tokenizer.decode(document[:-1]) for document in documents]


def content_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_folders_and_json_lines_in_order(tmp_path, tokenizer):
    inputs = tmp_path / "in"
    (inputs / "b" / "skipped").mkdir(parents=True)
    (inputs / "b" / "2.txt").write_text("zwei")
    (inputs / "b" / "1.txt").write_text("eins\r\n🙂 ")
    (inputs / "b" / "skipped" / "3.txt").write_text("no")
    (inputs / "a.txt").write_text("")
    (inputs / "c.jsonl").write_text('{"text": "x", "body": "one"}\n\n{"body": "two"}\n')
    (inputs / "d.md").write_text("not asked for")
    single = tmp_path / "single.md"
    single.write_text("last")
    options = ("--field", "body", "--exclude", "skipped", "--tokenizer", tokenizer, "--output", tmp_path / "set")
    assert run(tokenize_text, "--input", inputs, single, *options) == 0
    assert texts_of(tmp_path / "set") == ["eins\r\n🙂 ", "zwei", "one", "two", "last"]


def test_special_tokens_in_the_text_stay_text(tmp_path, tokenizer):
    text = "a<|endoftext|>b <|endoftext|><|other|>"
    (tmp_path / "in.txt").write_text(text)
    changed = Tokenizer.from_file(str(tokenizer))
    changed.add_special_tokens(["<|other|>"])
    changed.enable_truncation(3)
    changed.save(str(tokenizer))
    assert run(tokenize_text, "--input", tmp_path / "in.txt", "--tokenizer", tokenizer, "--output", tmp_path / "s") == 0
    assert texts_of(tmp_path / "s") == [text]
    assert TokenDataset.open(tmp_path / "s").num_tokens == len(text) + 1


def test_an_end_of_document_token_that_is_not_marked_special(tmp_path, tokenizer):
    changed = Tokenizer.from_file(str(tokenizer))
    changed.add_tokens([AddedToken("<eod>", special=False)])
    changed.save(str(tokenizer))
    (tmp_path / "in.txt").write_text("a<eod>b")
    options = ("--eod", "<eod>", "--tokenizer", tokenizer, "--output", tmp_path / "s")
    assert run(tokenize_text, "--input", tmp_path / "in.txt", *options) == 0
    assert texts_of(tmp_path / "s") == ["a<eod>b"]


def test_bad_records(tmp_path, tokenizer, capsys):
    lines = [b'{"text": "good"}', b'{"text": "bad \xff"}', b"{broken", b'{"text": 3}', b"[]", b'{"text": "\\ud800!"}']
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    options = ("--input", tmp_path / "in.jsonl", "--tokenizer", tokenizer)
    assert run(tokenize_text, *options, "--output", tmp_path / "fail") == 2
    assert "in.jsonl:2: invalid UTF-8 at byte 14. --bad skip" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "tokenizer.json"]
    assert run(tokenize_text, *options, "--output", tmp_path / "skip", "--bad", "skip") == 0
    assert texts_of(tmp_path / "skip") == ["good"]
    printed = capsys.readouterr().out
    assert "5 bad records left out" in printed
    assert "in.jsonl:3: broken JSON" in printed
    assert "in.jsonl:4: no text under the key 'text'" in printed
    assert run(tokenize_text, *options, "--output", tmp_path / "replace", "--bad", "replace") == 0
    assert texts_of(tmp_path / "replace") == ["good", "bad \ufffd", "\ufffd\ufffd\ufffd!"]


def test_the_number_of_workers_changes_nothing(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(500)))
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1000)
    for workers in (1, 2, 3):
        folders = [tmp_path / f"{name}{workers}" for name in ("train", "validation")]
        options = ("--output", folders[0], "--validation-output", folders[1], "--validation-share", 0.1)
        options += ("--tokenizer", tokenizer, "--workers", workers, "--shard-tokens", 1000)
        assert run(tokenize_text, "--input", tmp_path / "in.jsonl", *options) == 0
        for folder, name in zip(folders, ("train", "validation"), strict=True):
            assert content_of(folder) == content_of(tmp_path / f"{name}1")
    train, validation = texts_of(tmp_path / "train2"), texts_of(tmp_path / "validation2")
    assert sorted(train + validation) == sorted(f"document {i}" for i in range(500))
    assert 20 < len(validation) < 80


def test_finished_output_is_reused_and_other_content_refused(tmp_path, tokenizer, capsys):
    source = tmp_path / "in.txt"
    source.write_text("some text")
    options = ("--input", source, "--tokenizer", tokenizer, "--output", tmp_path / "set")
    assert run(tokenize_text, *options) == 0
    before = content_of(tmp_path / "set")
    assert run(tokenize_text, *options) == 0
    assert "reused" in capsys.readouterr().out
    source.write_text("more text")
    assert run(tokenize_text, *options) == 2
    assert "holds other data (inputs_sha256 differ)" in capsys.readouterr().err
    assert content_of(tmp_path / "set") == before
    assert run(tokenize_text, *options, "--overwrite") == 0
    assert texts_of(tmp_path / "set") == ["more text"]
    source.write_bytes(b"\xff")
    assert run(tokenize_text, *options, "--overwrite") == 2
    assert texts_of(tmp_path / "set") == ["more text"]


def test_errors_are_one_line(tmp_path, tokenizer, capsys):
    text = tmp_path / "in.txt"
    text.write_text("text")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    lines, empty = tmp_path / "in.jsonl", tmp_path / "empty.txt"
    lines.write_text('{"body": "text"}\n')
    empty.touch()
    (tmp_path / "none").mkdir()
    good = {"--input": text, "--tokenizer": tokenizer, "--output": tmp_path / "set"}
    cases = [
        ({"--input": tmp_path / "nowhere"}, "no such input"),
        ({"--input": tmp_path, "--suffix": ".xyz"}, "no files that end in .xyz"),
        (
            {"--tokenizer": "gpt2"},
            "no tokenizer at gpt2: --tokenizer is the path of a file. data_tools/train",
        ),
        ({"--tokenizer": empty}, "empty.txt is empty: no tokenizer"),
        ({"--tokenizer": lines}, "in.jsonl is not a tokenizer.json: it holds body, no model"),
        ({"--tokenizer": tmp_path / "none"}, "holds no tokenizer.json, tokenizer.model or vocab.txt. data_tools/train"),
        ({"--input": lines}, "in.jsonl:1: no text under the key 'text': there are body"),
        ({"--input": empty}, "empty.txt: empty, left out"),
        ({"--tokenizer": text}, "is no WordPiece vocabulary"),
        ({"--tokenizer": broken}, "not a tokenizer.json"),
        ({"--backend": "gigatoken", "--tokenizer": broken}, "not a tokenizer.json"),
        ({"--eod": "<end>"}, "has no token '<end>': name its end-of-document token by --eod, of ['<|endoftext|>']"),
        ({"--validation-output": tmp_path / "set"}, "are the same folder"),
        ({"--validation-output": tmp_path / "v", "--validation-share": 1.5}, "between 0 and 1"),
        (
            {"--validation-output": tmp_path / "v", "--validation-share": 1e-9},
            "none of them fell to this",
        ),
        ({"--workers": 0}, "must be at least 1"),
        ({"--output": tmp_path}, "is not a data set"),
    ]
    for change, message in cases:
        words = [word for pair in {**good, **change}.items() for word in pair]
        assert run(tokenize_text, *words) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "set").exists()


def test_train_tokenizer_is_deterministic_and_keeps_what_is_there(tmp_path, capsys):
    (tmp_path / "in.txt").write_text("the cat and the hat and the bat " * 20)
    options = ("--input", tmp_path / "in.txt", "--output")
    for name in ("a.json", "b.json"):
        assert run(train_tokenizer, *options, tmp_path / name, "--vocab-size", 270) == 0
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    made = Tokenizer.from_file(str(tmp_path / "a.json"))
    assert made.get_vocab_size() == 270
    assert made.decode(made.encode("naïve 🙂\n\tx").ids) == "naïve 🙂\n\tx"
    assert run(train_tokenizer, *options, tmp_path / "a.json", "--vocab-size", 270) == 0
    assert "already there" in capsys.readouterr().out
    assert run(train_tokenizer, *options, tmp_path / "a.json", "--vocab-size", 265) == 2
    assert run(train_tokenizer, *options, tmp_path / "c.json", "--vocab-size", 256) == 2


def test_the_tools_run_as_scripts(tmp_path):
    (tmp_path / "in.txt").write_text("hello world")
    commands = [
        f"train_tokenizer.py --input {tmp_path}/in.txt --output {tmp_path}/t.json --vocab-size 260",
        f"tokenize_text.py --input {tmp_path}/in.txt --tokenizer {tmp_path}/t.json --output {tmp_path}/set --workers 2",
        f"inspect_shards.py {tmp_path}/set --document 0 --verify",
    ]
    for command in commands:
        ran = script(command)
        assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("every byte is as it was written\nhello world<|endoftext|>\n")


def test_a_traceback_is_shown_on_request_only(tmp_path, capsys):
    folder = make_dataset(tmp_path / "set", num_tokens=5)
    options = (folder, "--document", 7)
    assert run(inspect_shards, *options) == 2
    assert capsys.readouterr().err == "error: no document 7: the data set has documents 0 to 0\n"
    assert run(inspect_shards, *options, "--debug") == 2
    told = capsys.readouterr().err
    assert "Traceback" in told and told.endswith("error: no document 7: the data set has documents 0 to 0\n")


def test_a_picture_in_the_way_stays(tmp_path, capsys):
    folder, picture = make_dataset(tmp_path / "set", num_tokens=5), tmp_path / "lengths.png"
    picture.write_bytes(b"older")
    assert run(inspect_shards, folder, "--lengths", picture) == 2
    told = capsys.readouterr()
    assert told.err.startswith(f"error: {picture} ") and "--overwrite" in told.err and not told.out
    assert picture.read_bytes() == b"older"
    assert run(inspect_shards, folder, "--lengths", picture, "--overwrite") == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def script(command):
    # megatrain need not be installed for the tests
    name, *words = command.split()
    program = [sys.executable, f"data_tools/{name}", *words]
    return subprocess.run(program, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=60)
