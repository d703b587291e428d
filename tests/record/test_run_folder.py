"""The run folder: what stands in it, and what a start that cannot have it is told."""

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from megatrain.checkpoint.store.errors import StorageError
from megatrain.config.reading.problems import ConfigError
from megatrain.config.schema import OptimizerConfig, RunConfig
from megatrain.record.run_folder import RunFolder, RunFolderError, other_versions, require_steps_left, versions
from megatrain.train.run import require_room
from tests.configs import model_spec


def config_in(tmp_path: Path) -> RunConfig:
    return RunConfig(name="small", folder=str(tmp_path / "runs"))


def test_prepare_records_config_and_versions(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    run = RunFolder.of(config)
    assert not run.path.exists(), "making the object touches nothing"
    run.prepare(config)
    assert run.path == tmp_path / "runs" / "small"
    assert RunConfig(**yaml.safe_load(run.config.read_text())) == config
    versions = json.loads(run.versions.read_text())
    assert versions["torch"].startswith("2.")
    assert {"python", "deepspeed", "megatron-core", "megatrain", "host", "git_commit"} <= set(versions)
    assert run.checkpoints.is_dir()
    assert run.tensorboard.is_dir()


def test_a_second_start_keeps_the_id_and_the_metrics(tmp_path: Path) -> None:
    config = config_in(tmp_path)
    run = RunFolder.of(config)
    run.prepare(config)
    first_id = run.run_id
    run.metrics.write_text('{"step": 1}\n')
    longer = config.model_copy(update={"train": config.train.model_copy(update={"steps": 200})})
    run.prepare(longer)
    assert run.run_id == first_id
    assert run.metrics.read_text() == '{"step": 1}\n'
    assert yaml.safe_load(run.config.read_text())["train"]["steps"] == 200


def test_other_versions_are_told() -> None:
    here = {name: text for name, text in versions().items() if text}
    assert other_versions(here | {"host": "another", "started": "long ago"}) == []
    other = here | {"torch": "1.0", "python": "3.9.1", "of an older megatrain": "1"}
    assert other_versions(other) == [f"python 3.9.1 then, {here['python']} now", f"torch 1.0 then, {here['torch']} now"]


def test_runs_have_different_ids(tmp_path: Path) -> None:
    ids = set()
    for name in ("a", "b"):
        run = RunFolder(tmp_path / name)
        run.prepare(RunConfig())
        ids.add(run.run_id)
    assert len(ids) == 2


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where the folder should be")
    with pytest.raises(RunFolderError, match=r"small cannot be made: .*/runs is not a folder.*set `name` or `folder`"):
        RunFolder.of(config_in(tmp_path)).make()


def test_a_file_with_the_runs_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/small").symlink_to("nowhere")
    with pytest.raises(RunFolderError, match=r"/runs/small is not a folder\. Move that away"):
        RunFolder.of(config_in(tmp_path)).make()


def test_a_place_of_another_user_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where this user may do everything, the system is asked no question that would show it."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(RunFolderError, match=r"small: Permission denied \(.*checkpoints\)\. Set `folder`"):
        RunFolder.of(config_in(tmp_path)).make()


def test_a_disk_without_room_for_one_checkpoint_is_told_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW keeps a weight and two moments of each parameter, four bytes each; Lion one moment."""
    config = config_in(tmp_path).model_copy(update={"model": model_spec({"vocab_size": 100, "num_layers": 1})})
    D, F = 256, 704
    parameters = 2 * 100 * D + D + 4 * D * D + 3 * D * F + 2 * D
    for optimizer, need in (("adamw", 12 * parameters), ("lion", 8 * parameters)):
        chosen = config.model_copy(update={"optimizer": OptimizerConfig(name=optimizer)})
        for free, fits in ((need, True), (need - 1, False)):
            monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
            with nullcontext() if fits else pytest.raises(StorageError, match=f"needs {need} bytes .*set `folder`"):
                require_room(RunFolder.of(config), chosen)


def test_fewer_steps_than_were_made_are_refused() -> None:
    config = RunConfig(train={"steps": 6})
    require_steps_left(config, 6, Path("step-00000006"))
    with pytest.raises(ConfigError, match=r"train\.steps = 6\n    is less than the 8 steps that were made already"):
        require_steps_left(config, 8, Path("step-00000008"))


def test_metrics_that_cannot_be_written_are_found_at_the_start(tmp_path: Path) -> None:
    run = RunFolder.of(config_in(tmp_path))
    run.metrics.mkdir(parents=True)
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl"):
        run.prepare(config_in(tmp_path))
