"""Loading as a whole: precedence, origins, and all problems at once."""

from pathlib import Path

import pytest

from megatrain.config.load import load_config, value_at
from megatrain.config.reading.fields import all_fields, all_sections
from megatrain.config.reading.problems import ConfigError, Problem
from megatrain.config.schema import RunConfig


def problems_of(text: str, folder: Path, *overrides: str, world_size: int | None = None) -> dict[str, Problem]:
    path = folder / "my.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config([path], overrides, world_size)
    problems = {problem.key: problem for problem in caught.value.problems}
    assert len(problems) == len(caught.value.problems), "a key is reported twice"
    for problem in problems.values():
        assert problem.message and problem.allowed and problem.cure and problem.origin
        assert str(problem) in str(caught.value)
    return problems


def test_nothing_given_is_the_schema_s_defaults() -> None:
    resolved = load_config([])
    assert resolved.config == RunConfig()
    assert set(resolved.origins) == set(all_fields())
    assert set(resolved.origins.values()) == {"default"}


def test_later_files_and_the_command_line_win(tmp_path: Path) -> None:
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text("train:\n  steps: 10\n  seed: 1\n  log_every: 1\n")
    second.write_text("# later\ntrain:\n  seed: 2\n  log_every: 2\ndata:\n")
    resolved = load_config([first, second], ["--train.log_every", "3"])
    train = resolved.config.train
    assert (train.steps, train.seed, train.log_every) == (10, 2, 3)
    assert resolved.origins["train.steps"] == f"{first}:2"
    assert resolved.origins["train.seed"] == f"{second}:3"
    assert resolved.origins["train.log_every"] == "command line"
    assert resolved.origins["train.compile"] == "default"


def test_numbers_and_nulls() -> None:
    config = load_config(
        [], ["--optimizer.lr=3e-4", "--optimizer.grad_clip", "1", "--model.attention.num_kv_heads=null"]
    ).config
    assert config.optimizer.lr == 3e-4
    assert config.optimizer.grad_clip == 1.0
    assert config.model.attention.num_kv_heads is None


def test_derived_fields_stay_open_until_the_world_is_known() -> None:
    resolved = load_config([], ["--parallel.tp=2"])
    assert resolved.config.parallel.dp is None
    derived = resolved.with_derived(4)
    assert derived.config.parallel.dp == 2
    filled = {key for key, origin in derived.origins.items() if origin == "derived"}
    assert filled == {
        "model.blocks", "model.tie_embeddings", "model.attention.num_kv_heads", "model.attention.head_width",
        "model.attention.bias",
        "model.attention.head_norms", "model.positions.kind", "model.positions.num_token_types", "model.head_transform",
        "model.rope.original_max_seq_len", "model.norm.kind",
        "model.norm.placement", "model.norm.embedding",
        "model.feed_forward.hidden_size", "model.feed_forward.activation", "model.feed_forward.bias",
        "model.experts.hidden_size", "parallel.dp", "schedule.decay_steps",
    }  # fmt: skip
    assert derived.origins["parallel.tp"] == "command line"
    with pytest.raises(ConfigError, match="left over"):
        resolved.with_derived(5)


def test_all_problems_are_shown_at_once(tmp_path: Path) -> None:
    text = """
model:
  attention: {num_heads: 7, num_kv_head: 2}
train:
  steps: many
  micro_batch_size: 3
optimizer: {lr: 0}
precision:
  dtype: [bf16, fp16]
parallel: {pp: 2, zero_stage: 3}
deepspeed:
  fp16: {enabled: true}
"""
    problems = problems_of(text, tmp_path, "--schedule.name=cosin", world_size=2)
    assert set(problems) == {
        "model.attention.num_heads", "model.attention.num_kv_head", "train.steps",
        "train.global_batch_size", "optimizer.lr",
        "precision.dtype", "parallel.zero_stage", "deepspeed.fp16", "schedule.name",
    }  # fmt: skip
    assert problems["model.attention.num_heads"].origin == f"{tmp_path}/my.yaml:3"
    assert problems["schedule.name"].origin == "command line"
    assert problems["train.global_batch_size"].origin == "default"
    assert problems["deepspeed.fp16"].origin == f"{tmp_path}/my.yaml:12"


@pytest.mark.parametrize(
    ("text", "key", "cure"),
    [
        ("model: {hiden_size: 64}", "model.hiden_size", "did you mean model.hidden_size?"),
        ("model: {hidden-size: 64}", "model.hidden-size", "did you mean model.hidden_size?"),
        ("train: {lr: 1}", "train.lr", "did you mean optimizer.lr?"),
        ("num_layers: 4", "num_layers", "did you mean model.num_layers?"),
        ("modle: {num_layers: 4}", "modle", "did you mean model?"),
        ("zqx: 4", "zqx", "leave it out; docs/config.md lists all keys"),
        ("precision: {bf16: true}", "precision.bf16", "choose one: precision.dtype: bf16"),
        ("precision: {fp16: {enabled: true}}", "precision.fp16", "choose one: precision.dtype: fp16"),
        ("bf16: true", "bf16", "choose one: precision.dtype: bf16"),
        ("data.seq_len: 64", "data.seq_len", "write it in two lines: `data:`, and below it, indented, `seq_len: 64`"),
    ],
)
def test_an_unknown_key_gets_the_nearest(tmp_path: Path, text: str, key: str, cure: str) -> None:
    (problem,) = problems_of(text, tmp_path).values()
    assert (problem.key, problem.cure) == (key, cure)
    assert problem.origin.endswith("my.yaml:1")


@pytest.mark.parametrize(
    ("override", "message", "cure"),
    [
        ("--precision.dtype=[bf16, fp16]", "is not one of the choices", "choose one of fp32, bf16, fp16"),
        ("--train.steps=0", "is too small", "set train.steps to a whole number, at least 1, such as 100"),
        ("--train.steps=1e3", "has the wrong type", "write it without point and exponent: 1000"),
        ("--train.steps=null", "has the wrong type", "set train.steps to a whole number, at least 1, such as 100"),
        ("--train.steps=true", "has the wrong type", "set train.steps to a whole number, at least 1, such as 100"),
        ("--model.dropout=1", "is too large", "set model.dropout to a number, at least 0 and below 1, such as 0.0"),
        ("--optimizer.lr=.inf", "is not a finite number", "set optimizer.lr to a number, above 0, such as 0.0003"),
        ("--optimizer.lr=3e-4x", "has the wrong type", "set optimizer.lr to a number, above 0, such as 0.0003"),
        ("--parallel.dp=0", "is too small", "set parallel.dp to a whole number, at least 1, or null"),
        ("--train.compile=yes", "has the wrong type", "write true or false"),
        ("--name=2024", "has the wrong type", "put it in quotes: \"2024\" (on a command line: '\"2024\"')"),
        ("--name=a/b", "has characters that are not allowed", "write it as a-b"),
        ("--name=..", "has characters that are not allowed", "write it in these characters, such as run-1"),
        ("--name=''", "is empty", "write it in these characters, such as run-1"),
        ("--model=3", "is a section and not a value", "put `key: value` lines below `model:`"),
        ("--deepspeed=[1]", "has the wrong type", "set deepspeed to a section of keys"),
        ("--train.steps.x=3", "has the wrong type", "set train.steps to a whole number, at least 1, such as 100"),
    ],
)  # fmt: skip
def test_a_wrong_value_gets_a_cure(override: str, message: str, cure: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([], [override])
    (problem,) = caught.value.problems
    assert problem.message == message
    assert problem.cure == cure
    assert problem.origin == "command line"


def test_rules_that_read_a_bad_value_keep_quiet() -> None:
    """num_heads is wrong in itself; what it should divide is then unknown."""
    with pytest.raises(ConfigError) as caught:
        load_config([], ["--model.attention.num_heads=x", "--model.hidden_size=100", "--model=3"])
    assert [problem.key for problem in caught.value.problems] == ["model"]
    with pytest.raises(ConfigError) as caught:
        load_config([], ["--model.attention.num_heads=x", "--model.hidden_size=100", "--data.seq_len=2000"])
    assert [problem.key for problem in caught.value.problems] == ["model.attention.num_heads", "data.seq_len"]


def test_a_derived_value_at_fault_is_said_to_be_derived() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(
            [], ["--parallel.tp=3", "--model.attention.num_heads=12", "--model.hidden_size=768", "--model.vocab_size=9"]
        )
    (problem,) = caught.value.problems
    assert (problem.key, problem.value, problem.origin) == ("model.feed_forward.hidden_size", 2048, "derived")


def test_broken_files_are_all_named_and_nothing_else(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [")
    with pytest.raises(ConfigError) as caught:
        load_config([bad, tmp_path / "gone.yaml"], ["--train.steps=0", "word"])
    assert [problem.key for problem in caught.value.problems] == ["config file", "config file", "argument"]


def test_extra_deepspeed_keys_have_origins_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("deepspeed:\n  comms_logger:\n    enabled: true\n")
    resolved = load_config([path], ["--deepspeed.comms_logger.verbose=true"])
    assert resolved.config.deepspeed == {"comms_logger": {"enabled": True, "verbose": True}}
    assert resolved.origins["deepspeed.comms_logger.enabled"] == f"{path}:3"
    assert resolved.origins["deepspeed.comms_logger.verbose"] == "command line"


def test_every_field_says_what_it_may_be() -> None:
    assert {key.rpartition(".")[0] for key in all_fields() if "." in key} == set(all_sections())
    for key, field in all_fields().items():
        assert field.allowed and field.description and field.description.endswith("."), key
        assert value_at(RunConfig(), key) == field.default, key


FILE = """\
data:
  train:
    a: x
    b: {path: y, weight: 2}
  validation: {small: v}
train:
  steps: 50
  ramp:
    - {until_step: 9}
    - until_step: 5
      seq_len: 64
"""


def loaded(tmp_path: Path, *overrides: str) -> RunConfig:
    (tmp_path / "run.yaml").write_text(FILE.replace("until_step: 5", "until_step: 12"))
    return load_config([tmp_path / "run.yaml"], overrides).config


def test_a_mapping_of_names_is_replaced_and_a_dotted_key_goes_into_it(tmp_path: Path) -> None:
    def weights(*overrides: str) -> dict[str, str]:
        return {name: source.weight for name, source in loaded(tmp_path, *overrides).data.train.items()}

    assert weights("--data.train", "{c: z}") == {"c": "1"}
    assert weights("--data.train.b.weight", "3") == {"a": "1", "b": "3"}
    assert weights("--data.train.c", "z") == {"a": "1", "b": "2", "c": "1"}
    assert loaded(tmp_path, "--data.validation", "{large: w}").data.validation == {"large": "w"}
    assert loaded(tmp_path, "--data.validation.large", "w").data.validation == {"small": "v", "large": "w"}
    (tmp_path / "more.yaml").write_text("data: {train: {c: z}}\n")
    assert list(load_config([tmp_path / "run.yaml", tmp_path / "more.yaml"]).config.data.train) == ["c"]


def test_null_replaces_and_only_an_empty_section_sets_nothing(tmp_path: Path) -> None:
    assert loaded(tmp_path, "--data.validation", "null").data.validation == {}
    (tmp_path / "run.yaml").write_text(FILE.replace("until_step: 5", "until_step: 12"))
    (tmp_path / "empty.yaml").write_text("data:\n  # nothing\ntrain:\n")
    config = load_config([tmp_path / "run.yaml", tmp_path / "empty.yaml"]).config
    assert list(config.data.train) == ["a", "b"] and config.train.steps == 50
    (tmp_path / "empty.yaml").write_text("data: null\n")
    assert load_config([tmp_path / "run.yaml", tmp_path / "empty.yaml"]).config.data.train == {}
    communication = ["--deepspeed.wall_clock_breakdown", "true"]
    assert load_config([], communication).config.deepspeed == {"wall_clock_breakdown": True}
    assert load_config([], [*communication, "--deepspeed", "null"]).config.deepspeed == {}
    (tmp_path / "empty.yaml").write_text("data:\n  validation:\n")
    assert load_config([tmp_path / "run.yaml", tmp_path / "empty.yaml"]).config.data.validation == {}


def test_what_is_wrong_in_a_list_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(FILE)
    with pytest.raises(ConfigError) as error:
        load_config([path])
    (problem,) = error.value.problems
    assert (problem.key, problem.origin) == ("train.ramp.1.until_step", f"{path}:10")
    path.write_text(FILE.replace("seq_len: 64", "seq_len: none"))
    with pytest.raises(ConfigError) as error:
        load_config([path])
    assert {(p.key, p.origin) for p in error.value.problems} == {("train.ramp.1.seq_len", f"{path}:11")}
    with pytest.raises(ConfigError) as error:
        load_config([], ["--optimizer.rules", "[{pattern: head.*, lr_scale: -1}]"])
    assert [p.origin for p in error.value.problems] == ["command line"]
