"""YAML that has no end when written out, is nested without end, or larger than a config: refused in moments."""

import os
from pathlib import Path

import pytest

from megatrain.config.load import load_config
from megatrain.config.reading.problems import ConfigError
from megatrain.convert.errors import ConversionError
from megatrain.convert.model_file import read_model


def doubled(first: str, following: str, count: int) -> str:
    lines = [f"a0: &a0 {first}"] + [f"a{i}: &a{i} " + following.format(f"*a{i - 1}") for i in range(1, count)]
    return "\n".join([*lines, f"model: *a{count - 1}\n"])


BOMBS = {
    "lists": (doubled("[x, x]", "[{0}, {0}, {0}, {0}, {0}, {0}]", 20), "aliases stand for more than 100000 values"),
    "mappings": (doubled("{x: 1}", "{{p: {0}, q: {0}}}", 60), "aliases stand for more than 100000 values"),
    "merged": (doubled("{x: 1}", "{{<<: [{0}, {0}], y: 1}}", 60), "aliases stand for more than 100000 values"),
    "brackets": ("model: " + "[" * 1_000_000, "nested too deeply"),
    "indented": ("".join(f"{' ' * i}a:\n" for i in range(600)), "nested too deeply"),
    "itself": ("model: &a [*a]\n", "recursive|valid dictionary|nested too deeply"),
    "layers": ("model: {num_layers: 1000000000}\n", "too large|less than or equal to 10000"),
    "digits": ("model: {num_layers: " + "9" * 5000 + "}\n", "4300 digits"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_gets_one_message(tmp_path: Path, bomb: str) -> None:
    text, message = BOMBS[bomb]
    path = tmp_path / "model.yaml"
    path.write_text(text)
    with pytest.raises(ConversionError, match=message) as told:
        read_model(tmp_path, None)
    assert str(path) in str(told.value)
    with pytest.raises(ConfigError, match=message) as refused:
        load_config([path])
    assert len(str(told.value)) + len(str(refused.value)) < 4000


def test_aliases_of_a_person_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text("width: &w 16\nmodel: {hidden_size: *w, num_heads: 2, ffn_hidden_size: *w}\n")
    assert read_model(tmp_path, None).feed_forward.hidden_size == 16


@pytest.mark.timeout(20)
def test_endless_files_and_pipes(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.touch()
    os.truncate(path, 2**38)
    with pytest.raises(ConversionError, match="274877906944 bytes"):
        read_model(tmp_path, None)
    with pytest.raises(ConfigError, match="more than"):
        load_config([path])
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ConversionError, match="a pipe"):
        read_model(tmp_path, None)
