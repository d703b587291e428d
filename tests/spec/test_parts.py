"""The table of a model's parts is what models are made of: names, shapes and splits, for every config."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megatrain.config.load import load_config
from megatrain.models.build import build_empty_model
from megatrain.models.initial import initialize
from megatrain.parallel.layers import Layers
from megatrain.parallel.marks import split_dims
from megatrain.spec.families import FAMILIES
from megatrain.spec.parts import parameters
from megatrain.spec.schema import ModelSpec
from tests.configs import model_spec
from tests.layouts import Layout, build_engine, run_config
from tests.pool import Pool

ROOT = Path(__file__).parents[2]
SIZES = {"num_layers": 3, "hidden_size": 32, "attention.num_heads": 4, "attention.num_kv_heads": 2, "vocab_size": 64}
MIXTURE = {"experts.num_experts": 4, "experts.num_shared": 1, "experts.num_dense_layers": 1}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"tie_embeddings": True},
    {"tie_embeddings": False, "attention.bias": False, "feed_forward.bias": True},
    {"attention.head_norms": True, "attention.head_width": 12, "norm.kind": "layer_norm"},
    {"positions.kind": "learned", "feed_forward.activation": "gelu", "norm.kind": "rms_norm"},
    {"norm.placement": "post", "norm.embedding": True, "positions.num_token_types": 3},
    {"head_transform": True, "feed_forward.activation": "gelu_erf", "tie_embeddings": False},
    {"head_transform": True, "tie_embeddings": True, "norm.placement": "pre"},
    MIXTURE,
]


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def assert_the_table_is_the_model(model: ModelSpec) -> None:
    with torch.device("meta"):
        built = shapes_of(build_empty_model(model))
    listed = {name: entry.shape for name, entry in parameters(model).items()}
    assert listed == built and list(listed) == list(built)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_of_every_family_and_part(family: str) -> None:
    for variant in VARIANTS:
        assert_the_table_is_the_model(model_spec({**SIZES, "family": family, **variant}))


def test_names_and_shapes_of_every_config_file() -> None:
    files = [*(ROOT / "configs/model").glob("*.yaml"), ROOT / "configs/run/quickstart.yaml"]
    assert len(files) >= 9
    for path in files:
        assert_the_table_is_the_model(load_config([path]).with_derived(8 if "run" in path.parts else 1).config.model)


def splits(family: str, layout: Layout, model: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    config = run_config(family, layout, model=model)
    engine = build_engine(config)
    axes = {axis for axis in ("tp", "ep") if getattr(layout, axis) > 1}
    listed = {
        name: {axis: dim for axis, dim in entry.split.items() if axis in axes}
        for name, entry in parameters(config.model).items()
    }
    found = {name: split_dims(parameter) for name, parameter in engine.parameters}
    engine.close()
    return listed, found


@pytest.mark.parametrize(
    ("family", "layout", "model"),
    [
        ("gpt", Layout(tp=2), {}),
        ("qwen3", Layout(tp=2, sequence_parallel=True), {"attention.bias": True}),
        ("llama", Layout(dp=2, ep=2, zero_stage=1), MIXTURE),
        ("llama", Layout(tp=2, zero_stage=1), MIXTURE),
    ],
    ids=str,
)
def test_splits_are_those_of_the_layers(pool: Pool, family: str, layout: Layout, model: dict[str, Any]) -> None:
    for listed, found in pool.run(splits, layout.world_size, family, layout, model):
        assert listed == found


def test_a_parameter_that_no_part_lists_is_an_error() -> None:
    model = model_spec(SIZES)
    stray = nn.Module()
    stray.memory = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(LookupError, match="memory has no initial weights"):
        initialize(stray, model, 0, Layers())


def test_no_file_but_the_presets_and_the_tables_of_converters_knows_a_family() -> None:
    tables = {"spec/families.py", "spec/schema.py", "convert/huggingface/tokenizer.py"}  # the schema has the default
    knowing = []
    for path in sorted((ROOT / "megatrain").rglob("*.py")):
        name = str(path.relative_to(ROOT / "megatrain"))
        if name in tables or name.startswith("convert/families/"):
            continue
        words = (node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
        knowing += [f"{name}: {word}" for word in words if isinstance(word, str) and word in FAMILIES]
    assert knowing == []
