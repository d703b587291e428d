"""Ids of the first, last and padding token, and the tokenizer: the same behind an import and an export."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megatrain.checkpoint.store.tokenizer_file import CarriedTokenizer
from megatrain.convert.errors import ConversionError
from megatrain.convert.formats import FORMATS, Choices
from megatrain.convert.huggingface.tokenizer import special_ids, with_end
from megatrain.convert.native import NativeReader, NativeWriter
from megatrain.convert.run import Request, convert
from tests.convert.models import save_model
from tests.data.factory import byte_tokenizer

IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def ids_of(folder: Path, file: str = "config.json") -> list[Any]:
    found = json.loads((folder / file).read_text())
    return [found.get(name) for name in IDS]


def test_ids_go_both_ways(tmp_path: Path) -> None:
    """Of config.json and of generation_config.json, which may differ; what is null stays null."""
    from transformers import AutoModelForCausalLM

    source = save_model("llama2", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config |= {"bos_token_id": 5, "eos_token_id": [7, 9], "pad_token_id": None}
    (source / "config.json").write_text(json.dumps(config))
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 11, "top_p": 0.5}))
    convert(Request(source, tmp_path / "run", "megatrain", verify=False))
    convert(Request(tmp_path / "run", tmp_path / "back", "huggingface", longest=32))
    assert ids_of(tmp_path / "back") == [5, [7, 9], None]
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["top_p"]) == (5, 0.5)
    assert generation["eos_token_id"] == [11, 7], "what ends the documents of the checkpoint is among them"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert loaded.config.eos_token_id == [7, 9] and loaded.generation_config.eos_token_id == [11, 7]


def test_ids_are_found_wherever_they_stand(tmp_path: Path) -> None:
    shutil.copy(save_model("llama2", tmp_path / "source") / "tokenizer.json", tmp_path / "tokenizer.json")
    settings = {"bos_token": {"content": "a"}, "eos_token": "<|endoftext|>", "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert special_ids(tmp_path, 131) == {"bos_token_id": 66, "eos_token_id": 0, "pad_token_id": None}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
    assert special_ids(tmp_path, 131)["eos_token_id"] == 3
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "pad_token_id": 8}))
    assert list(special_ids(tmp_path, 131).values()) == [1, 2, 8], "a Llama's own, where its config has none"
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": "</s>"}))
    with pytest.raises(ConversionError, match="eos_token_id = '</s>' is no token id"):
        special_ids(tmp_path, 131)


def test_an_end_is_added_once() -> None:
    assert [with_end(ends, 4) for ends in (None, 4, 3, [3, 4])] == [4, 4, [3, 4], [3, 4]]
    assert with_end([3], None) == [3]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A checkpoint of 300 tokens with the tokenizer of its data, whose documents end with token 0."""
    reader = FORMATS["huggingface"].read(save_model("llama2", tmp_path / "source", tokens=300), Choices())
    convert(Request(reader.path, tmp_path / "bare", "megatrain", verify=False))
    bare = NativeReader(tmp_path / "bare" / "step-00000000")
    writer = NativeWriter(tmp_path / "run" / "checkpoints", bare.model, 5, CarriedTokenizer(byte_tokenizer(), 0))
    writer.begin({})
    for name in bare.names():
        writer.write("weight", name, bare.read("weight", name))
    writer.finish()
    return tmp_path / "run"


def test_a_trained_model_brings_its_tokenizer_and_stops(tmp_path: Path, run: Path) -> None:
    """Without an option: the end of the data's documents is that of the model's texts."""
    from transformers import AutoTokenizer

    convert(Request(run / "checkpoints", tmp_path / "out", "huggingface", longest=32))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == byte_tokenizer()
    assert ids_of(tmp_path / "out") == ids_of(tmp_path / "out", "generation_config.json") == [0, 0, None]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.eos_token_id == 0 and tokenizer.decode(tokenizer("a b")["input_ids"]) == "a b"


def test_another_tokenizer_is_refused(tmp_path: Path, run: Path) -> None:
    other = json.loads(byte_tokenizer())
    choices = Choices(tokenizer=tmp_path / "other.json")
    request = Request(run / "checkpoints", tmp_path / "out", "huggingface", verify=False, choices=choices)
    (tmp_path / "other.json").write_text(json.dumps(other, indent=3))
    convert(Request(run / "checkpoints", tmp_path / "same", "huggingface", verify=False, choices=choices))
    vocabulary = other["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(ConversionError, match=r"other\.json is not the tokenizer of .*: its tokens have other ids"):
        convert(request)
    vocabulary["ab"] = 300
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(ConversionError, match="has the token id 300, the model only 300 tokens"):
        convert(request)
    (tmp_path / "other.json").write_text("hello")
    with pytest.raises(ConversionError, match=r"other\.json is no tokenizer\.json"):
        convert(request)
