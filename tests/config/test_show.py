"""A config as text, and back."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.config.derive import resolve
from megatrain.config.load import Resolved, from_yaml, load_config
from megatrain.config.reading.fields import all_fields
from megatrain.config.reading.problems import ConfigError
from megatrain.config.show import format_config, to_yaml
from tests.configs import run_config_of


def test_every_value_is_shown_with_its_origin(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("model:\n  num_layers: 6\n")
    extra = ["--optimizer.lr=1e-3", "--deepspeed.comms_logger.enabled=true"]
    text = format_config(load_config([path], extra).with_derived(2))
    lines: dict[str, str] = {}
    for line in text.splitlines():
        lines.setdefault(line.partition(":")[0].strip(), line)
    assert lines["num_layers"].endswith(f"# {path}:2")
    assert lines["lr"].endswith("# command line")
    assert lines["enabled"].endswith("# command line")
    assert lines["dp"].split() == ["dp:", "2", "#", "derived"]
    assert lines["hidden_size"].endswith("# default")
    with_origin = [line for line in text.splitlines() if "  # " in line]
    assert len(with_origin) == len(all_fields())
    assert len({line.index("  # ") for line in with_origin}) == 1, "comments stand in one column"


def test_one_long_value_does_not_move_the_column() -> None:
    text = format_config(load_config([], [f"--folder={'x' * 200}"]))
    assert max(line.index("  # ") for line in text.splitlines() if "default" in line) < 80


awkward = st.sampled_from(
    ["3e-4", "12e5", "yes", "null", "", "a # b", "a: b", "'", '"', "- x", "2024-01-01", "1:30", "é"]
)


@settings(max_examples=200, deadline=None)
@given(
    folder=awkward | st.text(st.characters(exclude_categories=["Cs"])),
    lr=st.floats(1e-12, 1e12),
    steps=st.integers(1, 2**63 - 1),
)
def test_what_is_written_is_read_back(folder: str, lr: float, steps: int) -> None:
    values: dict[str, Any] = {"folder": folder, "optimizer": {"lr": lr}, "train": {"steps": steps}}
    config = run_config_of(values)
    resolved = resolve(config, 1)
    assert from_yaml(to_yaml(config)) == from_yaml(to_yaml(resolved)) == resolved
    origins = {"folder": "runs/my.yaml:3"}
    assert from_yaml(format_config(Resolved(resolved, origins))) == resolved


def test_other_readers_of_yaml_read_the_same() -> None:
    config = load_config([], ["--optimizer.lr=3e-7", "--folder='yes'", "--name='12e5'"]).config
    assert yaml.safe_load(to_yaml(config)) == config.model_dump(mode="json")
    assert yaml.safe_load(format_config(load_config([], ["--optimizer.lr=3e-7"]))) is not None


def test_a_stored_config_is_a_config_file(tmp_path: Path) -> None:
    resolved = load_config([], ["--parallel.tp=2", "--deepspeed.dump_state=true"]).with_derived(4)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(resolved.config))
    assert load_config([path]).with_derived(4).config == resolved.config


def test_a_damaged_stored_config_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"stored\.yaml:2"):
        from_yaml("name: x\nmodle: {}\n", "stored.yaml")
