"""The run folder: what stands in it, and what a start that cannot have it is told."""

import json
from pathlib import Path

import pytest
import yaml

from megatrain.config.schema import RunConfig
from megatrain.train.run_folder import RunFolder, RunFolderError, other_versions, versions


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
    with pytest.raises(RunFolderError, match=r"cannot write the run folder .*small: Not a directory.*Set `folder`"):
        RunFolder.of(config_in(tmp_path)).prepare(config_in(tmp_path))


def test_metrics_that_cannot_be_written_are_found_at_the_start(tmp_path: Path) -> None:
    run = RunFolder.of(config_in(tmp_path))
    run.metrics.mkdir(parents=True)
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl"):
        run.prepare(config_in(tmp_path))
