"""clean_text: normalisation, each rule, duplicates."""

import gzip
import json
import random

import pytest

from data_tools import clean_text
from megatrain.data.corpus.documents import RecordReader
from megatrain.data.corpus.inputs import find_sources
from megatrain.data.corpus.quality import DEFAULT_RULES, RULES, broken_rule, normalize

WORDS = ["the", "of", "and", "to", "language", "model", "reads", "many", "pages", "with", "care", "because", "data"]


def prose(seed: int, num_words: int = 120) -> str:
    generator = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    own = ["".join(generator.choices(letters, k=generator.randrange(3, 9))) for _ in range(num_words)]
    words = [generator.choice((word, generator.choice(WORDS))) for word in own]
    return "".join(word + ("\n" if at % 12 == 11 else " ") for at, word in enumerate(words)).strip()


BREAKS = {
    "empty": " \n ",
    "short": "Only a few words.",
    "long": "word " * 100_001,
    "word-length": "a b c d e f " * 40,
    "symbols": "# heading with marks " * 30,
    "bullets": "\n".join(f"- another entry number {number} within some lengthy list" for number in range(20)),
    "ellipses": "\n".join(f"line {number} goes on and on …" for number in range(20)),
    "letters": "1234 5678 word " * 30,
    "repeated-lines": "\n".join([prose(1, 12)] * 10),
    "repeated-pairs": "buy now " * 20 + prose(2, 60),
    "stop-words": "Der schnelle braune Fuchs springt über den faulen Hund hinweg und freut sich darüber sehr. " * 3,
}


@pytest.mark.parametrize("rule", BREAKS)
def test_each_rule_takes_its_own(rule):
    assert set(BREAKS) == {"empty", *RULES}
    assert broken_rule(BREAKS[rule], [rule] if rule in RULES else []) == rule
    assert broken_rule(prose(3) + " the of", list(RULES)) is None


def test_normalisation():
    text = "\ufeffcafe\u0301 \r\nx\u200b\x00\ty  \rz\n\n\n\nend\n"
    assert normalize(text) == "café\nx\ty\nz\n\nend"
    assert normalize("ﬁ ①", "NFKC") == "fi 1"
    assert normalize("e\u0301", "none") == "e\u0301"
    assert normalize(normalize(text)) == normalize(text)


def near_copy(text: str) -> str:
    words = text.split(" ")
    words[50] = "changed"
    return " ".join(words)


def test_what_stays_and_what_is_counted(tmp_path, capsys):
    good = [prose(seed, 300) for seed in range(30)]
    texts = [*good[:20], good[3].upper(), near_copy(good[5]), *good[20:], "", BREAKS["short"], BREAKS["bullets"]]
    lines = [json.dumps({"text": text}) for text in texts]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines, "broken"]))
    options = ["--input", str(tmp_path / "in.jsonl"), "--bad", "skip", "--report", str(tmp_path / "r.json")]
    options += ["--rules", *DEFAULT_RULES]
    for workers in ("1", "2"):
        output = tmp_path / f"out{workers}.jsonl.gz"
        (tmp_path / "r.json").unlink(missing_ok=True)
        assert clean_text.main([*options, "--output", str(output), "--workers", workers]) == 0
        records = [json.loads(line) for line in gzip.decompress(output.read_bytes()).splitlines()]
        assert [record["text"] for record in records] == good
        assert records[0]["origin"].endswith("in.jsonl:1")
        report = json.loads((tmp_path / "r.json").read_text())
        counts = {name: fate["documents"] for name, fate in report.items() if isinstance(fate, dict)}
        wanted = {"kept": 30, "exact-duplicate": 1, "near-duplicate": 1, "short": 1, "bullets": 1}
        assert {name: count for name, count in counts.items() if count} == wanted
        assert report["bad_records"] == 2
    assert (tmp_path / "out1.jsonl.gz").read_bytes() == (tmp_path / "out2.jsonl.gz").read_bytes()
    printed = capsys.readouterr().out
    assert "near-duplicate            1 documents" in printed
    assert clean_text.main([*options, "--output", str(tmp_path / "out1.jsonl.gz")]) == 2
    options += ["--output", str(tmp_path / "k.jsonl"), "--duplicates", "keep", "--workers", "1"]
    assert clean_text.main(options) == 2, "an older report is not replaced either"
    assert "r.json is there already" in capsys.readouterr().err
    (tmp_path / "r.json").unlink()
    assert clean_text.main(options) == 0

    assert len((tmp_path / "k.jsonl").read_text().splitlines()) == 32


def chinese(seed: int, num_letters: int = 600) -> str:
    """Letters as frequent as 1 / rank, with a mark after about every tenth."""
    generator = random.Random(seed)
    letters = [chr(0x4E00 + 7 * number) for number in range(1500)]
    drawn = generator.choices(letters, [1 / (number + 8) for number in range(1500)], k=num_letters)
    return "".join(letter + (generator.choice("，。") if generator.random() < 0.1 else "") for letter in drawn)


def test_text_without_spaces_passes_and_its_near_copies_are_found(tmp_path):
    texts = [chinese(seed) for seed in range(5)]
    korean = "모든 국민은 법률이 정하는 바에 의하여 국가기관에 문서로 청원할 권리를 가진다 " * 6
    assert [broken_rule(text, DEFAULT_RULES) for text in [*texts, korean]] == [None] * 6
    near = texts[2][:300] + "好" + texts[2][301:]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, near]))
    options = ["--input", str(tmp_path / "in.jsonl"), "--workers", "1", "--samples", str(tmp_path / "s.jsonl")]
    assert clean_text.main([*options, "--output", str(tmp_path / "out.jsonl")]) == 0
    kept = [json.loads(line)["text"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert kept == texts
    (sample,) = map(json.loads, (tmp_path / "s.jsonl").read_text().splitlines())
    assert sample == {"rule": "near-duplicate", "origin": f"{tmp_path / 'in.jsonl'}:6", "text": near}


def test_every_end_of_line_or_page_keeps_words_apart():
    for mark in ("\r\n", "\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"):
        assert normalize(f"one{mark}two") == "one\ntwo"
    assert normalize("one\x1ftwo") == "one two"


def test_samples_are_as_many_as_asked_for_and_the_same_in_any_order(tmp_path):
    lines = [json.dumps({"text": f"too short {number}"}) for number in range(30)]
    written = []
    for order, name in ((1, "a"), (-1, "b")):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines[::order]))
        options = ["--input", str(tmp_path / f"{name}.jsonl"), "--samples", str(tmp_path / f"s{name}.jsonl")]
        options += ["--samples-per-rule", "4", "--workers", "1"]
        assert clean_text.main([*options, "--output", str(tmp_path / f"o{name}.jsonl")]) == 0
        samples = [json.loads(line) for line in (tmp_path / f"s{name}.jsonl").read_text().splitlines()]
        written.append([(sample["rule"], sample["text"]) for sample in samples])
    assert written[0] == written[1] and len(written[0]) == 4


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_the_output_is_what_its_name_says(tmp_path, ending, capsys):
    text = prose(9)
    (tmp_path / "in.txt").write_text(text)
    options = ["--input", str(tmp_path / "in.txt"), "--duplicates", "keep", "--workers", "1", "--output"]
    output = tmp_path / f"out.jsonl{ending}"
    assert clean_text.main([*options, str(output)]) == 0
    assert [document.text for document in RecordReader().read_all(find_sources([output]))] == [text]
    assert clean_text.main([*options, str(tmp_path / f"out.txt{ending}")]) == 2
    assert "it holds JSON lines, so it must end in one of .jsonl, .jsonl.gz" in capsys.readouterr().err
