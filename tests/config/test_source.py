"""YAML files and overrides: what is read, where it stood, what is refused."""

from pathlib import Path

import pytest

from megatrain.config.reading.problems import ConfigError
from megatrain.config.reading.source import Node, merge, read_file, read_overrides, read_text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4), ("1E5", 1e5), ("+2.5e+3", 2500.0), (".5", 0.5), ("1.", 1.0), (".inf", float("inf")),
        ("12", 12), ("-3", -3), ("0", 0), ("true", True), ("False", False), ("~", None), ("null", None), ("", None),
        ("yes", "yes"), ("off", "off"), ("1:30", "1:30"), ("2024-11-24", "2024-11-24"), ("010", "010"),
        ("1_000", "1_000"), ("1f1b", "1f1b"), ("'3e-4'", "3e-4"), ("[1, a]", [1, "a"]), ("e5", "e5"),
    ],
)  # fmt: skip
def test_values_follow_yaml_1_2(text: str, value: object) -> None:
    read = read_overrides([f"--a.b={text}"]).plain()["a"]["b"]
    assert read == value and type(read) is type(value)


def test_every_value_knows_its_line() -> None:
    tree = read_text("a: 1\nb:\n  # why\n  c: 2\n  d: {e: 3,\n      f: 4}\n", "x.yaml")
    lines = {"a": "x.yaml:1", "b.c": "x.yaml:4", "b.d.e": "x.yaml:5", "b.d.f": "x.yaml:6"}
    assert dict(tree.leaves()) == lines


def test_keys_are_text_whatever_they_look_like() -> None:
    assert read_text("on: 1\n3: 2\nnull: 3\n", "x").plain() == {"on": 1, "3": 2, "null": 3}


def test_anchors_and_merge_keys_work() -> None:
    text = "base: &base {a: 1, b: 2}\nown:\n  <<: *base\n  b: 3\n"
    assert read_text(text, "x").plain()["own"] == {"a": 1, "b": 3}


@pytest.mark.parametrize(
    ("text", "origin", "words"),
    [
        ("a: 1\nb: [1\n", "x.yaml:3", "not valid YAML"),
        ("a: 1\n b: 2\n", "x.yaml:2", "not valid YAML"),
        ("a:\n\t- b\n", "x.yaml:2", "not valid YAML"),
        ("a: 1\nb: 2\na: 3\n", "x.yaml:3", "'a' stands here and in line 1"),
        ("m:\n  a: 1\n  'a': 3\n", "x.yaml:3", "'a' stands here and in line 2"),
        ("? [a, b]\n: 1\n", "x.yaml:1", "a key must be plain text"),
        ("a: !!python/object:os.system 1\n", "x.yaml:1", "could not determine a constructor"),
        ("a: &a\n  b: *a\n", "x.yaml:1", "nested too deeply"),
        ("a: 1\n---\nb: 1\n", "x.yaml:2", "single document"),
        ("a: \x00\n", "x.yaml:1", "not allowed"),
        ("- a\n- b\n", "x.yaml:1", "holds no keys"),
        ("word", "x.yaml:1", "holds no keys"),
    ],
)
def test_a_broken_file_is_refused_with_its_line(text: str, origin: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_text(text, "x.yaml")
    (problem,) = caught.value.problems
    assert words in problem.message and problem.cure
    assert problem.origin == origin


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "null\n"])
def test_an_empty_file_sets_nothing(text: str) -> None:
    assert read_text(text, "x.yaml").plain() == {}


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_an_unreadable_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"x\.yaml") as caught:
        read_file(path)
    assert caught.value.problems[0].cure


def test_both_forms_of_overrides_and_the_last_one_wins() -> None:
    tree = read_overrides(["--a.b", "1", "--a.c=2=3", "--d", "-4", "--a.b=5", "--e={f: 6}"])
    assert tree.plain() == {"a": {"b": 5, "c": "2=3"}, "d": -4, "e": {"f": 6}}
    assert set(dict(tree.leaves()).values()) == {"command line"}


def test_all_bad_arguments_are_shown_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        read_overrides(["word", "--a.b", "--c", "[1", "--", "--d"])
    problems = [(problem.key, problem.message.split(":")[0]) for problem in caught.value.problems]
    assert problems == [
        ("argument", "is neither an override nor the value of one"),
        ("a.b", "has no value"),
        ("c", "is not valid YAML"),
        ("argument", "is neither an override nor the value of one"),
        ("d", "has no value"),
    ]
    assert all(problem.origin == "command line" and problem.cure for problem in caught.value.problems)


def test_merging_goes_key_by_key_and_keeps_origins() -> None:
    low = read_text("a: {x: 1, y: 2}\nb: 3\nc: {z: 1}\nd: {z: 1}", "low")
    high = read_text("a: {y: 4}\nc:\nd: [5]\n", "high")
    merged = merge(low, high)
    assert merged.plain() == {"a": {"x": 1, "y": 4}, "b": 3, "c": {"z": 1}, "d": [5]}
    assert dict(merged.leaves()) == {
        "a.x": "low:1", "a.y": "high:1", "b": "low:2", "c.z": "low:3",
        "d": "high:3", "d.0": "high:3",
    }  # fmt: skip
    assert merge(low, Node({}, "nothing")).plain() == low.plain()
