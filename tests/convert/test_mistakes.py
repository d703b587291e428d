"""Whatever stands in a config or on the command line: one message, never another exception, in bounded time."""

import json
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import megatrain
from launch.convert import main
from megatrain.checkpoint.store.arrays import CheckpointReader, CheckpointWriter
from megatrain.checkpoint.store.errors import CheckpointError
from megatrain.convert.errors import ConversionError
from megatrain.convert.formats import FORMATS, Choices
from megatrain.convert.model_file import read_model
from megatrain.convert.native import NativeReader
from megatrain.convert.table import Weights
from tests.convert.models import LONGROPE, YARN, save_model

SEED = 3
FUZZED = 150  # configs of each family
BOUND = 5.0  # seconds of one config, of which none should need one
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 10**9, 10**30, 0.0, -0.5, 0.5, 1e308, 1e-308, float("nan"),
    float("inf"), "", "3", "silu", [], [1], [[[]]], [None], {}, {"a": 1}, {"rope_type": []},
    {"rope_type": "yarn", "factor": "4"}, {"rope_type": "yarn", "factor": -1}, {"rope_type": "dynamic"},
    {"rope_type": "dynamic", "factor": 1e300}, {"rope_type": "linear", "factor": None, "rope_theta": [1]},
    {"rope_type": "longrope", "short_factor": [1.0]}, {"rope_type": "longrope", "original_max_position_embeddings": 0},
    {"rope_type": "yarn", "mscale": [], "mscale_all_dim": 1}, {"type": 5}, {"truncate": 1, "rope_type": "yarn"},
    LONGROPE, YARN, {"rope_type": "yarn", "original_max_position_embeddings": "long", "mscale": 1},
]  # fmt: skip
MORE = (
    "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings",
    "layer_types", "quantization_config", "mlp_only_layers", "decoder_sparse_step", "sliding_window", "num_experts",
)  # fmt: skip


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen3", "mixtral", "qwen3-moe-dense"])
def test_fuzzed_configs_give_one_message(tmp_path: Path, name: str) -> None:
    source = save_model(name, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    draw, taken = random.Random(SEED), 0
    names = [*config, *MORE]
    for _ in range(FUZZED):
        changed = dict(config)
        for field in draw.sample(names, draw.choice([1, 1, 1, 2, 3])):
            value = draw.choice([*VALUES, nested(draw.choice([5, 400]))])
            if draw.random() < 0.15:
                changed.pop(field, None)
            else:
                changed[field] = value
        (source / "config.json").write_text(json.dumps(changed))
        begin = time.perf_counter()
        try:
            Weights(FORMATS["huggingface"].read(source, Choices())).require_complete()
            taken += 1
        except ConversionError as error:
            assert 0 < len(str(error)) < 3000, str(error)[:3000]
        assert time.perf_counter() - begin < BOUND, changed
    assert 0 < taken < FUZZED / 2, "some changes change nothing that is computed, most do"


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no ranks": (["source", "out", "--to", "deepspeed", "--zero-ranks", "0"], "--zero-ranks.*'0' is not a whole"),
    "tensor ranks": (["source", "out", "--to", "deepspeed", "--tensor-ranks", "-1"], "--tensor-ranks.*'-1' is not"),
    "multiple": (["source", "out", "--to", "megatrain", "--vocab-multiple", "0"], "--vocab-multiple.*'0' is not"),
    "proof": (["source", "out", "--to", "megatrain", "--proof-tokens", "0"], "--proof-tokens.*'0' is not"),
    "shards": (["source", "out", "--to", "megatrain", "--shard-gb", "nan"], "--shard-gb.*'nan' is not a number"),
    "here": (["source", ".", "--to", "megatrain"], r"is there already \(a folder\): remove it, or choose another"),
    "root": (["source", "/", "--to", "megatrain"], "is there already"),
    "a link": (["source", "link", "--to", "megatrain"], "link is there already"),
    "many ranks": (["source", "out", "--to", "deepspeed", "--zero-ranks", "1000000"], "leave some of them without any"),
    "huge multiple": (["source", "out", "--to", "megatrain", "--vocab-multiple", str(10**15)], "no model is so large"),
    "no tokenizer": (["source", "out", "--to", "megatrain", "--tokenizer", "nope"], "--tokenizer nope is not there"),
    "a bad tokenizer": (["source", "out", "--to", "megatrain", "--tokenizer", "file"], "file is no tokenizer.json"),
    "no model": (["run", "out", "--to", "megatron", "--dtype", "int8"], "invalid choice: 'int8'"),
    "no source": (["nowhere", "out", "--to", "megatrain"], "nowhere does not exist; the formats are"),
    "a file": (["file", "out", "--to", "megatrain"], "file holds no model in a known format"),
    "under a file": (["source", "file/out", "--to", "megatrain"], "Not a directory|is there already|File exists"),
}  # fmt: skip


def test_mistakes_on_the_command_line_get_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model("llama2", tmp_path / "source")
    (tmp_path / "file").write_text("hello")
    (tmp_path / "link").symlink_to("nowhere")
    for name, (arguments, message) in MISTAKES.items():
        try:
            code: Any = main(arguments)
        except SystemExit as error:  # argparse's
            code = error.code
        told = capsys.readouterr()
        assert code == 2 and not told.out, (name, told)
        assert len(re.findall("error: ", told.err)) == 1 and re.search(message, told.err), (name, told.err)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "file", "link"}, "nothing is left behind"


def test_a_missing_package_is_named_with_its_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(megatrain, "convert", megatrain.convert)  # comes back with the modules
    for name in [name for name in sys.modules if name.startswith("megatrain.convert")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert main([str(tmp_path), str(tmp_path / "target"), "--to", "huggingface"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1
    assert "needs the package safetensors" in told and 'pip install -e ".[convert]"' in told


def test_model_files_that_are_none_are_refused_in_bounded_time(tmp_path: Path) -> None:
    levels = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 12)]
    files = {
        "bomb": ("\n".join(["l0: &l0 [1]", *levels, "model: *l11"]), "aliases stand for more than"),
        "loop": ("model: &m {family: *m}", "holds no valid section `model`"),
        "layers": (yaml.safe_dump({"model": {"num_layers": 10**9}}), "num_layers = 1000000000: Input should be less"),
        "experts": (
            yaml.safe_dump({"model": {"experts": {"num_experts": 10**9}}}),
            "num_experts = 1000000000: no model is so large",
        ),
        "field": (yaml.safe_dump({"model": {"window": 3}}), "window = 3: Extra inputs are not permitted"),
        "list": ("[1]", "holds no valid section `model`"),
        "bytes": ("\udcff", "holds no valid section `model`"),
        "deep": ("model: " + "[" * 2000, "holds no valid section `model`"),
        "large": ("model: {}\n#" + "x" * 2**20, "at most 1048576"),
    }
    for name, (text, message) in files.items():
        (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
        begin = time.perf_counter()
        with pytest.raises(ConversionError, match=message):
            read_model(tmp_path, tmp_path / name)
        assert time.perf_counter() - begin < BOUND, name


def test_states_of_another_version_are_named(tmp_path: Path) -> None:
    import numpy as np

    states: list[tuple[dict[str, Any], str]] = [
        ({}, "model is missing"),
        ({"model": {"window": 3}}, "fields that are not known here: model.window"),
        ({"model": {"num_layers": 10**9}}, "too few for num_layers 1000000000"),
        (
            {"model": {"num_layers": 1, "experts": {"num_experts": 4}, "router": {"balance_rate": 0.1}}},
            "not those of its model",
        ),
    ]
    for number, (state, message) in enumerate(states, 1):
        writer = CheckpointWriter(tmp_path, number, "test")
        writer.prepare()
        writer.write("weight", "a", np.zeros(2, np.float32), offset=(0,), full_shape=(2,))
        path = writer.commit(writer.records(), state, {})
        writer.close()
        with pytest.raises(CheckpointError, match=message):
            NativeReader(path)
        from megatrain.inference.generate import load_model

        with pytest.raises(CheckpointError):
            load_model(CheckpointReader(path).path)
