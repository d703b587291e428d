"""pack_pairs and pack_images; the tokenizers that train_tokenizer makes."""

import gzip
import json
import struct

import numpy as np
import pytest
from tokenizers import Tokenizer

from data_tools import pack_images, pack_pairs, train_tokenizer
from megatrain.data.corpus.encode import Encoder
from megatrain.data.pool import Pool
from megatrain.data.shards.manifest import Manifest
from megatrain.data.shards.reader import TokenDataset
from megatrain.data.shards.verify import find_problems
from tests.data.factory import byte_tokenizer

PAIRS = [("one", "eins"), ("two words", "zwei Wörter"), ("x" * 50, "lang"), ("last", "letztes")]


def run(tool, *words):
    return tool.main([str(word) for word in words])


def texts_of(folder):
    dataset = TokenDataset.open(folder)
    tokenizer = Tokenizer.from_file(str(dataset.tokenizer_path))
    return [tokenizer.decode(dataset.document(n)[:-1].tolist()) for n in range(dataset.num_documents)]


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "t.json"
    path.write_bytes(byte_tokenizer())
    return path


def test_pairs_from_json_lines_and_from_two_files(tmp_path, tokenizer, capsys):
    lines = [json.dumps({"en": source, "de": target}) for source, target in PAIRS]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines, '{"en": "no target"}', '{"en": "", "de": "leer"}']))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("\n".join(source for source, _ in PAIRS).encode()))
    (tmp_path / "b.txt").write_text("\n".join(target for _, target in PAIRS))
    options = ("--tokenizer", tokenizer, "--max-source-tokens", 20, "--output")
    fields = ("--input", tmp_path / "in.jsonl", "--source-field", "en", "--target-field", "de")
    files = ("--source", tmp_path / "a.txt.gz", "--target", tmp_path / "b.txt")
    assert run(pack_pairs, *fields, *options, tmp_path / "x") == 2
    assert "in.jsonl:5: no text under the key 'de': there are en. --bad skip leaves" in capsys.readouterr().err
    assert run(pack_pairs, *fields, *options, tmp_path / "x", "--bad", "skip") == 0
    assert run(pack_pairs, *files, *options, tmp_path / "y") == 0
    kept = [pair for pair in PAIRS if len(pair[0]) < 20]
    for name, num_bad in (("x", 2), ("y", 0)):
        for side, expected in (("source", [a for a, _ in kept]), ("target", [b for _, b in kept])):
            assert texts_of(tmp_path / name / side) == expected
            assert list(find_problems(tmp_path / name / side, Pool(None, 1))) == []
        facts = json.loads((tmp_path / name / "pairs.json").read_text())
        assert (facts["pairs"], facts["too_long"], facts["bad"]) == (3, 1, num_bad)
    (tmp_path / "b.txt").write_text("only one")
    assert run(pack_pairs, *files, *options, tmp_path / "z") == 2
    assert "has more lines than the other file, from line 2" in capsys.readouterr().err
    assert run(pack_pairs, *files, *options, tmp_path / "y") == 2
    assert run(pack_pairs, *files, *fields, *options, tmp_path / "z") == 2


def test_images_from_folders_and_from_idx(tmp_path, capsys):
    pictures = pytest.importorskip("PIL.Image")
    random = np.random.default_rng(1)
    images = random.integers(0, 256, (6, 4, 5), dtype=np.uint8)
    labels = np.array([3, 7, 3, 3, 7, 7], np.uint8)
    (tmp_path / "images").write_bytes(struct.pack(">4I", 0x803, 6, 4, 5) + images.tobytes())
    (tmp_path / "labels.gz").write_bytes(gzip.compress(struct.pack(">2I", 0x801, 6) + labels.tobytes()))
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / "folder" / str(label)
        folder.mkdir(parents=True, exist_ok=True)
        pictures.fromarray(image).save(folder / f"{number}.png")
    idx = ("--input", tmp_path / "images", "--labels", tmp_path / "labels.gz")
    assert run(pack_images, *idx, "--output", tmp_path / "x") == 0
    assert run(pack_images, "--input", tmp_path / "folder", "--gray", "--output", tmp_path / "y") == 0
    by_class = np.argsort(labels, kind="stable")
    for name, order in (("x", np.arange(6)), ("y", by_class)):
        dataset = TokenDataset.open(tmp_path / name)
        for number, place in enumerate(order):
            expected = [257 + (labels[place] == 7), *images[place].ravel(), 256]
            assert dataset.document(number).tolist() == expected
        assert list(find_problems(tmp_path / name, Pool(None, 1))) == []
        facts = Manifest.read(tmp_path / name).lineage["images"]
        assert facts == {"height": 4, "width": 5, "channels": 1, "classes": ["3", "7"]}
    tokenizer = Tokenizer.from_file(str(tmp_path / "x" / "tokenizer.json"))
    assert tokenizer.decode([257, 0, 255, 256], skip_special_tokens=False) == "<class:3> 0 255 <|endoftext|>"
    pictures.new("RGB", (9, 9), (1, 2, 3)).save(tmp_path / "folder" / "7" / "other.png")
    assert run(pack_images, "--input", tmp_path / "folder", "--output", tmp_path / "z") == 2
    assert "other.png is (9, 9, 3), the first image (4, 5, 3): choose a --size" in capsys.readouterr().err
    assert run(pack_images, "--input", tmp_path / "folder", "--size", 4, 5, "--output", tmp_path / "z") == 0
    assert TokenDataset.open(tmp_path / "z").document(6).tolist() == [258, *[1, 2, 3] * 20, 256]
    (tmp_path / "images").write_bytes((tmp_path / "images").read_bytes()[:-1])
    assert run(pack_images, *idx, "--output", tmp_path / "w") == 2
    assert "is cut short in image 5" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["bpe", "wordpiece", "unigram"])
def test_trained_tokenizers(tmp_path, model):
    text = "The cat and the hat: naïve <|endoftext|> [SEP] <0x41> cafés.\n"
    (tmp_path / "in.txt").write_text(text * 30)
    options = ("--input", tmp_path / "in.txt", "--model", model, "--vocab-size", 330, "--special", "<|user|>")
    for name in ("a.json", "b.json"):
        assert run(train_tokenizer, *options, "--output", tmp_path / name) == 0
    made = [json.loads((tmp_path / name).read_text())["model"] for name in ("a.json", "b.json")]
    if model == "unigram":  # its scores vary a little
        pieces = [{piece: score for piece, score in content.pop("vocab")} for content in made]
        assert pieces[0] == pytest.approx(pieces[1], abs=0.1)
    if model == "wordpiece":  # where counts tie, its trainer chooses as it likes
        vocabularies = [set(content.pop("vocab")) for content in made]
        assert len(vocabularies[0] & vocabularies[1]) > 0.8 * len(vocabularies[0])
    assert made[0] == made[1]
    encoder = Encoder((tmp_path / "a.json").read_bytes())
    assert encoder.tokenizer.token_to_id("<|user|>") is not None
    assert encoder.eod == ("[SEP]" if model == "wordpiece" else "<|endoftext|>")
    ids = encoder.encode([text + "<|user|> 日本 🙂"])[0].tolist()
    specials = {n for n, token in encoder.tokenizer.get_added_tokens_decoder().items() if token.content != "[UNK]"}
    assert not specials.intersection(ids)
    if model != "wordpiece":
        assert encoder.tokenizer.decode(ids) == text + "<|user|> 日本 🙂"


def test_pictures_of_16_bits_of_a_turned_camera_and_what_is_left_out(tmp_path, capsys):
    pictures = pytest.importorskip("PIL.Image")
    folder = tmp_path / "in"
    for name in ("a", "b", ".hidden", "empty"):
        (folder / name).mkdir(parents=True)
    deep = np.array([[0, 255, 256], [32768, 65280, 65535]], np.uint16)
    pictures.fromarray(deep).save(folder / "a" / "deep.png")
    turned = np.array([[10, 20, 30], [40, 50, 60]], np.uint8)
    exif = pictures.Exif()
    exif[0x0112] = 3  # by half a turn (Exif 2.3, tag Orientation)
    pictures.fromarray(turned).save(folder / "b" / "turned.PNG", exif=exif)
    pictures.fromarray(turned).save(folder / ".hidden" / "x.png")
    pictures.fromarray(turned).save(folder / "loose.png")
    (folder / "a" / "notes.txt").write_text("no picture")
    assert run(pack_images, "--input", folder, "--gray", "--output", tmp_path / "x") == 0
    dataset = TokenDataset.open(tmp_path / "x")
    assert dataset.document(0).tolist() == [257, 0, 0, 1, 128, 255, 255, 256]
    assert dataset.document(1).tolist() == [258, 60, 50, 40, 30, 20, 10, 256]
    assert Manifest.read(tmp_path / "x").lineage["images"]["classes"] == ["a", "b"]
    told = capsys.readouterr().err
    assert "3 files left out (2 *.png, 1 *.txt)" in told
    assert all(name in told for name in (".hidden/x.png", "loose.png", "a/notes.txt"))
    pictures.fromarray(np.ones((2, 3), np.float32)).save(folder / "b" / "f.tiff")
    (folder / "b" / "f.tiff").rename(folder / "b" / "f.gif")
    assert run(pack_images, "--input", folder, "--gray", "--output", tmp_path / "y") == 2
    assert "f.gif has samples that are fractions" in capsys.readouterr().err


def test_pairs_from_tables_and_behind_a_byte_order_mark(tmp_path, tokenizer, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    records = [{"de": {"text": target}, "en": source} for source, target in PAIRS]
    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "t.parquet")
    lines = [json.dumps({"en": source, "de": {"text": target}}) for source, target in PAIRS]
    (tmp_path / "t.jsonl").write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    for side, texts in zip("ab", zip(*PAIRS, strict=True), strict=True):
        (tmp_path / f"{side}.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(texts).encode())
    fields = ("--source-field", "en", "--target-field", "de.text")
    for number, options in enumerate(
        (
            ("--input", tmp_path / "t.parquet", *fields),
            ("--input", tmp_path / "t.jsonl", *fields),
            ("--source", tmp_path / "a.txt", "--target", tmp_path / "b.txt"),
        )
    ):
        output = tmp_path / str(number)
        assert run(pack_pairs, *options, "--tokenizer", tokenizer, "--output", output) == 0
        assert texts_of(output / "source") == [source for source, _ in PAIRS]
        assert texts_of(output / "target") == [target for _, target in PAIRS]
    (tmp_path / "array.json").write_text(json.dumps([{"en": "a", "de": "b"}]))
    for path, message in ((tmp_path / "array.json", "is one JSON array"), (tmp_path / "a.txt", "is neither .jsonl")):
        assert run(pack_pairs, "--input", path, "--tokenizer", tokenizer, "--output", tmp_path / "z") == 2
        assert message in capsys.readouterr().err
