"""What people mistype, and what they are told: the likely meaning, in a form that works."""

import argparse
from pathlib import Path

import pytest

from launch import parity, pretrain
from megatrain import __main__ as package
from megatrain.config.load import load_config
from megatrain.config.reading.arguments import options_and_overrides
from megatrain.config.reading.problems import ConfigError, Problem

ROOT = Path(__file__).parents[2]


def only_problem(*overrides: str, file: Path | None = None) -> Problem:
    with pytest.raises(ConfigError) as caught:
        load_config([file] if file else [], overrides)
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [
        ("precision.dtype", "bfloat16", "bf16"),
        ("precision.dtype", "half", "fp16"),
        ("precision.gradient_dtype", "FP32", "fp32"),
        ("model.family", "mistrall", "mistral"),
        ("model.family", "Qwen-3", "qwen3"),
        ("optimizer.name", "Adam", "adamw"),
        ("schedule.name", "cosin", "cosine"),
    ],
)
def test_choices_by_other_names(key: str, value: str, meant: str) -> None:
    problem = only_problem(f"--{key}", value)
    assert (problem.key, problem.value, problem.origin) == (key, value, "command line")
    assert problem.cure.startswith(f"did you mean {meant}? choose one of ")


@pytest.mark.parametrize(("name", "near"), [("my run", "my-run"), ("öl", "ol"), ("a/b", "a-b"), ("-x", "x")])
def test_names_get_the_nearest_that_is_allowed(name: str, near: str) -> None:
    run = only_problem(f"--name={name}")
    assert run.cure == f"write it as {near}" and "[" not in run.allowed
    load_config([], ["--name", near])


def test_names_of_data_sets_and_characters_without_a_likeness() -> None:
    problem = only_problem("--data.train", "{my set: x}")
    assert problem.message == "is a name with characters that are not allowed"
    assert problem.cure == "write it as my-set" and "digits" in problem.allowed
    assert only_problem("--name", "日本").cure == "write it in these characters, such as run-1"


@pytest.mark.parametrize(
    ("key", "override"),
    [
        ("data.train.a.weight", ["--data.train", "{a: {path: x, weight: -1}}"]),
        ("data.train.a.weight", ["--data.train", "{a: {path: x, weight: lots}}"]),
        ("data.weight_schedule.0.weights.a", ["--data.weight_schedule", "[{from_sample: 3, weights: {a: -1}}]"]),
    ],
)
def test_weights(key: str, override: list[str]) -> None:
    problem = only_problem(*override)
    assert problem.key == key and problem.message.startswith("is no weight: it is ")
    assert problem.allowed == "numbers of 0 or more, and fractions: 3, 0.3 or 3/7"
    assert problem.cure == f"set {key} to 0 (no samples) or more, such as 1"


@pytest.mark.parametrize("number", [2**63, -(2**63) - 1, 10**30])
@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("model.hidden_size", "model: {{hidden_size: {}}}"),
        ("train.seed", "train: {{seed: {}}}"),
        ("optimizer.lr", "optimizer: {{lr: {}}}"),
        ("train.ramp.0.until_step", "train: {{ramp: [{{until_step: {}}}]}}"),
        ("data.train.a.weight", "data: {{train: {{a: {{path: x, weight: {}}}}}}}"),
        ("deepspeed.wall_clock_breakdown", "deepspeed: {{wall_clock_breakdown: {}}}"),
    ],
)
def test_integers_that_64_bits_do_not_hold(tmp_path: Path, key: str, text: str, number: int) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(f"\n{text.format(number)}\n")
    problem = only_problem(file=file)
    assert (problem.key, problem.value, problem.message) == (key, number, "is too large")
    assert "9223372036854775807" in problem.allowed and problem.origin == f"{file}:2"


def test_the_largest_integer_is_taken() -> None:
    assert load_config([], ["--data.seed", str(2**63 - 1)]).config.data.seed == 2**63 - 1


def test_home_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somebody")
    file = tmp_path / "a.yaml"
    file.write_text(
        "folder: ~/runs\ncheckpoint: {load: ~/step-1}\noffload: {parameters: nvme, nvme_path: ~/fast}\n"
        "parallel: {zero_stage: 3}\ndata: {train: ~/one, validation: ~/two, tokenizer: ~/t.json}\n"
    )
    config = load_config([file]).config
    assert (config.folder, config.checkpoint.load, config.offload.nvme_path, config.data.tokenizer) == (
        *("/somebody/runs", "/somebody/step-1", "/somebody/fast", "/somebody/t.json"),
    )
    assert (
        config.data.train["train"].path == "/somebody/one" and config.data.validation["validation"] == "/somebody/two"
    )
    override = load_config(
        [file], ["--folder=~/", "--data.train", "{a: ~/x, b: {path: ~/y}}", "--data.validation", "{v: a~b}"]
    )
    assert [source.path for source in override.config.data.train.values()] == ["/somebody/x", "/somebody/y"]
    assert override.config.data.validation == {"v": "a~b"}, "only the first character is a home folder"


def test_files_and_fields_as_other_programs_take_them(tmp_path: Path) -> None:
    assert only_problem("run.yaml").cure == "config files follow --config: write `--config run.yaml`"
    assert only_problem("train.steps=10").cure == "write `--train.steps=10`"
    as_file = only_problem(file=Path("train.steps=10"))
    assert as_file.cure == "a field is set by `--train.steps=10`, after the config files"


def test_options_nearly_written(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--print-config", action="store_true")
    with pytest.raises(ConfigError, match="did you mean --print-config"):
        options_and_overrides(parser, ["--print_config", "--name", "x"])
    options, rest = options_and_overrides(parser, ["--print-config", "--name", "x", "--data.print_config", "1"])
    assert options.print_config and rest == ["--name", "x", "--data.print_config", "1"]
    assert pretrain.main(["--dry_run"]) == 2 and "did you mean --dry-run" in capsys.readouterr().err
    assert parity.main(["--layout", "tp=2", "--agianst", "tp=1"]) == 2
    assert "did you mean --against" in capsys.readouterr().err


def test_no_config_at_all(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert pretrain.main([]) == 2
    errors = capsys.readouterr().err
    assert "`--config FILE`: none was given" in errors and errors.count("error: ") == 1


def test_the_package_names_its_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert package.main() == 2
    lines = capsys.readouterr().out.splitlines()
    programs = [path.relative_to(ROOT) for folder in ("launch", "data_tools") for path in ROOT.glob(f"{folder}/*.py")]
    for program in programs:
        assert program.stem == "__init__" or any(line.startswith(f"  python {program} ") for line in lines)
    assert any("launch/pretrain.py" in line and line.endswith("Trains a Transformer.") for line in lines)
