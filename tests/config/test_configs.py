"""Every file in configs/ is valid alone and in the combinations it is made for; what is generated is up to date."""

import json
from pathlib import Path

import pytest

from megatrain.config.load import load_config
from megatrain.config.pages import reference
from megatrain.config.reading.fields import all_fields, nearest_keys
from megatrain.spec.counts import num_parameters

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))

# model, layout, ranks
LAYOUTS = [
    ("bert_tiny", "single", 1),
    ("bert_tiny", "tp2_pp2", 4),
    ("bert_tiny", "tp2_sequence", 4),
    ("bert_base", "zero3", 8),
    ("gpt_tiny", "single", 1),
    ("gpt_tiny", "tp2_pp2", 4),
    ("gpt_tiny", "tp2_sequence", 4),
    ("gpt_124m", "zero1", 8),
    ("gpt_124m", "pp2_interleaved", 4),
    ("llama_tiny", "pp2_interleaved", 2),
    ("llama_tiny", "tp2_pp2", 8),
    ("llama_tiny", "zero3", 4),
    ("llama_1b", "zero3", 8),
    ("llama_1b", "tp2_sequence", 8),
    ("llama_8b", "zero3", 8),
    ("llama_8b", "tp8_pp4", 64),
    ("llama_1b", "cp2", 8),
    ("moe_tiny", "ep2", 4),
    ("moe_tiny", "single", 1),
    ("moe_sigmoid", "ep2", 8),
    ("mixtral_8x7b", "ep2", 16),
]
# what a file asks for that stands in files of another kind
NEEDS = {"ep2.yaml": ["--model.experts.num_experts=8"]}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_file_alone(path: Path) -> None:
    load_config([path], NEEDS.get(path.name, []))
    first, *rest = path.read_text(encoding="utf-8").splitlines()
    named = first.removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / named).resolve() == CONFIGS / "schema.json"
    assert rest[0].startswith("# "), "says what it is"
    values = [line for line in rest if line and not line.startswith("#") and not line.endswith(":")]
    assert [line for line in values if " # " not in line] == [], "every key is commented"


@pytest.mark.parametrize(("model", "layout", "world_size"), LAYOUTS)
def test_a_model_in_a_layout(model: str, layout: str, world_size: int) -> None:
    files = [CONFIGS / "model" / f"{model}.yaml", CONFIGS / "parallel" / f"{layout}.yaml"]
    batch = ["--train.global_batch_size=16"]
    resolved = load_config([*files, CONFIGS / "data" / "quickstart.yaml"], batch, world_size).with_derived(world_size)
    assert resolved.config.model.num_layers == load_config(files[:1]).config.model.num_layers


def test_every_model_and_layout_is_combined() -> None:
    names = {name for model, layout, _ in LAYOUTS for name in (f"model/{model}", f"parallel/{layout}")}
    there = {str(path.relative_to(CONFIGS).with_suffix("")) for path in FILES}
    assert names == {name for name in there if name.startswith(("model/", "parallel/"))}


def test_runs() -> None:
    load_config([CONFIGS / "run" / "quickstart.yaml"], world_size=4)
    load_config([CONFIGS / "run" / "quickstart.yaml"], ["--parallel.tp=1", "--parallel.pp=1"], world_size=1)
    load_config(
        [CONFIGS / "model/gpt_124m.yaml", CONFIGS / "parallel/zero1.yaml", CONFIGS / "run/gpt_124m.yaml"], (), 8
    )


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("bert_base", 109518912),  # published: 109,514,298 without the padding rows and their biases
        ("gpt_124m", 124475904),
        ("llama_1b", 1235814400),
        ("llama_8b", 8030261248),
    ],
)
def test_a_model_file_states_its_size(name: str, number: int) -> None:
    path = CONFIGS / "model" / f"{name}.yaml"
    assert num_parameters(load_config([path]).with_derived(1).config.model) == number
    assert f"{number:,} parameters" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "number", "active"),
    [
        ("moe_tiny", 2723968, 1839232),
        ("moe_sigmoid", 1622639616, 301433856),
        ("mixtral_8x7b", 46702792704, 12879925248),  # published: 46.7 and 12.9 billion
    ],
)
def test_a_mixture_states_what_works_on_a_token(name: str, number: int, active: int) -> None:
    path = CONFIGS / "model" / f"{name}.yaml"
    model = load_config([path]).with_derived(1).config.model
    assert (num_parameters(model), num_parameters(model, active=True)) == (number, active)
    assert f"{number:,} parameters, {active:,} for each token" in path.read_text(encoding="utf-8")


def test_the_schema_for_editors_is_up_to_date() -> None:
    renew = "renew it: python -m megatrain.config.pages.reference"
    assert json.loads((ROOT / reference.SCHEMA_FILE).read_text(encoding="utf-8")) == reference.json_schema(), renew


def test_the_table_of_keys_is_up_to_date() -> None:
    page = (ROOT / reference.PAGE).read_text(encoding="utf-8")
    assert page == reference.with_table(page), "renew it: python -m megatrain.config.pages.reference"
    assert all(f"`{key}`" in page for key in all_fields() if key != "deepspeed")


def test_a_key_is_nearest_to_itself() -> None:
    for key in all_fields():
        assert nearest_keys(key, all_fields())[0] == key
