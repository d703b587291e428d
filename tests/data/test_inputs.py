"""Every kind of input gives the same documents, and what can't be read is named."""

import bz2
import gzip
import io
import json
import lzma
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.data.corpus import chunks, documents
from megatrain.data.corpus.chunks import Position, read_chunks
from megatrain.data.corpus.documents import RecordReader
from megatrain.data.corpus.inputs import find_sources, left_out_lines
from megatrain.data.errors import DataError

TEXTS = ["one", "zwei\r\nlines", "drei 🙂", " four "]


def zstd(content: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(content)


COMPRESS = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}


def json_lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def texts_of(*inputs: Path, **options) -> list[str]:
    reader = RecordReader(**{key: options.pop(key) for key in ("bad", "empty") if key in options})
    return [document.text for document in reader.read_all(find_sources(inputs, **options))]


@pytest.mark.parametrize("ending", COMPRESS)
def test_compressed_files(tmp_path, ending):
    compress = COMPRESS[ending]
    lines, text = tmp_path / f"a.jsonl{ending}", tmp_path / f"b.txt{ending}"
    lines.write_bytes(compress(json_lines(TEXTS[:2])) + compress(json_lines(TEXTS[2:])))  # several members
    text.write_bytes(compress(b"plain"))
    assert texts_of(tmp_path) == [*TEXTS, "plain"]
    whole = lines.read_bytes()
    lines.write_bytes(whole[:-3])
    with pytest.raises(DataError, match=rf"cannot read .*a.jsonl{ending}"):
        texts_of(lines)
    lines.write_bytes(b"not compressed at all")
    with pytest.raises(DataError, match=rf"cannot read .*a.jsonl{ending}"):
        texts_of(lines)


def test_parquet_with_null_and_other_columns(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    table = pyarrow.table({"body": [*TEXTS, None, "last"], "number": range(6)})
    parquet.write_table(table, path, row_group_size=2)
    with pytest.raises(DataError, match=r"a.parquet:5: no text \(null\)"):
        texts_of(path, field="body")
    assert texts_of(path, field="body", bad="skip") == [*TEXTS, "last"]
    with pytest.raises(DataError, match="has no column 'text': choose one of body, number"):
        texts_of(path)
    with pytest.raises(DataError, match="the column 'number' holds int64, not text"):
        texts_of(path, field="number")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"cannot read .*a.parquet"):
        texts_of(path, field="body")


def test_a_folder_of_the_datasets_library(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    folder = tmp_path / "saved" / "train"
    folder.mkdir(parents=True)
    for number, texts in enumerate((TEXTS[:1], TEXTS[1:])):
        table = pyarrow.table({"text": texts})
        with pyarrow.ipc.new_stream(folder / f"data-{number}.arrow", table.schema) as stream:
            stream.write_table(table)
    (folder / "cache-1.arrow").write_text("what state.json doesn't list")
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": f"data-{i}.arrow"} for i in (0, 1)]}))
    assert texts_of(folder) == TEXTS
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(DataError, match=r"holds several splits: name one of them, as in .*saved/train"):
        texts_of(tmp_path / "saved")
    (folder / "state.json").write_text("{}")
    with pytest.raises(DataError, match=r"state.json is not what datasets.save_to_disk writes"):
        texts_of(folder)


def test_standard_input_and_one_document_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(json_lines(TEXTS))))
    assert texts_of(Path("-")) == TEXTS
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\n\ntwo\nthree")
    assert texts_of(tmp_path, kind="lines") == ["one", "two", "three"]
    assert texts_of(tmp_path) == ["one\r\n\ntwo\nthree"]  # the byte order mark is no text
    with pytest.raises(DataError, match="can be read once only"):
        texts_of(Path("-"), Path("-"))


def test_a_field_inside_a_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": {"b": "deep"}}\n{"a.b": "flat"}\n')
    assert texts_of(tmp_path, field="a.b") == ["deep", "flat"]
    with pytest.raises(DataError, match=r"a.jsonl:1: no text under the key 'a': it holds an object"):
        texts_of(tmp_path, field="a")


def test_policies_count_and_name_each_record(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": ""}\n\n{"text": 1}\n{"text": "x\xff"}\n{"text": "good"}\nnull\n')
    (tmp_path / "b.txt").write_text("")
    reader = RecordReader(bad="skip")
    assert [document.text for document in reader.read_all(find_sources([tmp_path]))] == ["good"]
    assert [problem.replace(f"{tmp_path}/", "") for problem in reader.problems] == [
        "a.jsonl:1: empty, left out",
        "a.jsonl:3: no text under the key 'text': it holds a number, left out",
        "a.jsonl:4: invalid UTF-8 at byte 11, left out",
        "a.jsonl:6: no text under the key 'text': the line holds no object {…}, left out",
        "b.txt: empty, left out",
    ]
    with pytest.raises(DataError, match=r"a.jsonl:1: an empty document"):
        texts_of(tmp_path, bad="skip", empty="fail")


def test_a_line_that_is_too_long_is_a_bad_record(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1 << 10)
    monkeypatch.setattr(chunks, "MAX_LINE_BYTES", 1 << 14)
    (tmp_path / "a.jsonl").write_bytes(json_lines(["before", "x" * 50_000, "y" * 15_000, "after"]))
    with pytest.raises(DataError, match=r"a.jsonl:2: a line of 50\d+ bytes \(at most 16384 can be read\)"):
        texts_of(tmp_path)
    assert texts_of(tmp_path, bad="skip") == ["before", "y" * 15_000, "after"]


@pytest.mark.parametrize("kind", ["jsonl", "lines", "text", "table"])
def test_reading_goes_on_at_any_chunk_that_ends(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 100)
    texts = [f"text {number} of many" for number in range(40)]
    if kind == "table":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").table({"text": texts}), tmp_path / "a.parquet")
    elif kind == "text":
        for number, text in enumerate(texts):
            (tmp_path / f"{number:02d}.txt").write_text(text)
    else:
        content = json_lines(texts).decode() if kind == "jsonl" else "\n".join(texts)
        (tmp_path / "a.jsonl").write_text(content[:300])
        (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content.encode()))
        (tmp_path / "a.jsonl").write_text(content)
    sources = find_sources([tmp_path], kind=kind if kind == "lines" else None)

    def read_from(position: Position) -> list[tuple[str, str]]:
        reader = RecordReader()
        return [(d.text, d.origin) for chunk in read_chunks(sources, position) for d in reader.read(chunk)]

    everything = read_from(Position())
    assert [text for text, _ in everything[: len(texts)]] == texts
    done = 0
    all_chunks = list(read_chunks(sources))
    assert len(all_chunks) > 5
    for chunk in all_chunks:
        done += len(RecordReader().read(chunk))
        assert read_from(chunk.next) == everything[done:]


def text_in(line: bytes) -> str | None:
    """What a line of JSON lines holds, by the standard library alone; None: no text."""
    try:
        text = json.loads(line.decode())["text"]
        text.encode()
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return text or None


LINES = st.one_of(
    st.text(st.characters(exclude_categories=[]), max_size=30).map(lambda text: json.dumps({"text": text}).encode()),
    st.text(max_size=30).map(lambda text: json.dumps({"text": text}, ensure_ascii=False).encode()),
    st.sampled_from(
        [b"[" * 100_000, b'{"text": ' * 2000, b'{"text": NaN}', b'{"text": "a", "text": "b"}', b"\xef\xbb\xbf1"]
    ),
    st.binary(max_size=30),
)


@settings(max_examples=150, deadline=None)
@given(
    lines=st.lists(LINES, max_size=8),
    flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4),
    ends=st.booleans(),
)
def test_whatever_json_lines_hold_each_is_read_or_named(tmp_path_factory, lines, flips, ends):
    """Fuzzed: lone surrogates, broken bytes, deep nesting, changed bytes."""
    content = bytearray(b"\n".join(lines) + b"\n" * ends)
    for at, byte in flips if content else ():
        content[at % len(content)] = byte
    path = tmp_path_factory.mktemp("fuzz") / "a.jsonl"
    path.write_bytes(content)
    reader = RecordReader(bad="skip")
    found = [document.text for document in reader.read_all(find_sources([path]))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "orjson", None)
        without = RecordReader(bad="skip")
        assert [document.text for document in without.read_all(find_sources([path]))] == found
        assert without.problems == reader.problems
    records = [line for line in bytes(content).removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    expected = [text_in(line) for line in records]
    assert found == [text for text in expected if text is not None]
    assert len(reader.problems) == expected.count(None)


def test_a_large_text_comes_in_pieces_and_whole_again(tmp_path, monkeypatch):
    monkeypatch.setattr(chunks, "PIECE_BYTES", 1000)
    monkeypatch.setattr(chunks, "_CUT_SEARCH", 100)
    text = "wörd and 日本 " * 700 + "ä" * 3000 + " " * 3000 + "end"
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text("small")
    found = list(read_chunks(find_sources([tmp_path])))
    assert len(found) > 15
    assert [(chunk.begins, chunk.ends) for chunk in (found[0], found[1], found[-2], found[-1])] == [
        (True, False),
        (False, False),
        (False, True),
        (True, True),
    ]
    assert max(len(part.content) for chunk in found for part in chunk.parts) <= 1100
    assert texts_of(tmp_path) == [text, "small"]
    (tmp_path / "a.txt").write_bytes(text.encode() + b"\xff" + text.encode())
    assert texts_of(tmp_path, bad="skip") == ["small"]


def test_files_are_taken_or_named_for_what_they_are(tmp_path):
    (tmp_path / "a.txt.bz2").write_bytes(bz2.compress(b"bzip2"))
    (tmp_path / "b.TXT.GZ").write_bytes(gzip.compress(b"capitals"))
    (tmp_path / "c.JSONL").write_bytes(json_lines(["lines"]))
    assert texts_of(tmp_path) == ["bzip2", "capitals", "lines"]
    for name, content, message in (
        ("x.txt", gzip.compress(b"text"), "x.txt is gzip data: name it .gz"),
        ("x.jsonl", b"PK\x03\x04...", "is a zip archive"),
        ("x.txt", b"PAR1....", "is a Parquet table: name it .parquet"),
        ("x.txt", "text".encode("utf-16"), r"invalid UTF-8 at byte 0 \(UTF-16\? iconv"),
        ("x.json", b' \n[{"text": "a"}]', r"x.json is one JSON array, .* jq -c '.\[\]' .*x.json > .*x.jsonl"),
        ("x.json.gz", gzip.compress(b"[]"), r"is one JSON array"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message):
            texts_of(tmp_path / name)


def test_what_folders_hold_besides_is_counted_and_listed(tmp_path):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("a.txt", "b.json", "sub/c.md", "sub/d.md", "sub/out.txt"):
        (folder / name).write_text("x")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    left_out = []
    find_sources([folder], exclude=["out.txt"], left_out=left_out)
    assert sorted(path.name for path in left_out) == ["b.json", "c.md", "d.md", "link"]
    assert left_out_lines(left_out, "why")[0] == "4 files left out (2 *.md, 1 *.json, 1 without ending): why"
    with pytest.raises(DataError, match=r"no files that end in .xyz below .*; left out: .*2 \*.md"):
        find_sources([folder], suffixes=[".xyz"])


def test_tables_with_odd_columns(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    column = pyarrow.array(["one", "two", "one"]).dictionary_encode()
    nested = pyarrow.array([{"b": "x"}, None, {"b": "z"}])
    table = pyarrow.table({"text": column, "a": nested})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as file:
        file.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        assert texts_of(tmp_path / name) == ["one", "two", "one"]
        assert texts_of(tmp_path / name, field="a.b", bad="skip") == ["x", "z"]
        with pytest.raises(DataError, match=r"'a' holds struct<b: string>, no 'a.c': choose another by --field"):
            texts_of(tmp_path / name, field="a.c")
    twice = pyarrow.table([column, column], names=["text", "text"])
    parquet.write_table(twice, tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet has 2 columns named 'text'"):
        texts_of(tmp_path / "b.parquet")
