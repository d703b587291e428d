"""Starts that go on: a run that is done, one with another config, a second phase in a folder of its own, a dry run."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatrain.checkpoint.store.errors import CheckpointError
from megatrain.checkpoint.store.folder import list_checkpoints
from megatrain.config.reading.problems import ConfigError
from megatrain.config.schema import RunConfig
from tests.data.factory import make_dataset
from tests.layouts import Layout, build_engine, run_config
from tests.pool import Pool


def config_of(folder: Path, name: str = "first", steps: int = 4, **sections: dict[str, Any]) -> RunConfig:
    base: dict[str, dict[str, Any]] = {
        "model": {"num_layers": 1, "vocab_size": 300},
        "train": {"steps": steps, "log_every": 1, "eval_batches": 1, "global_batch_size": 4, "micro_batch_size": 4},
        "data": {"train": str(folder / "data"), "validation": {"a": str(folder / "data")}, "seq_len": 16},
        "checkpoint": {"background": False},
    }
    for section, values in sections.items():
        base[section] = {**base.get(section, {}), **values}
    made = run_config("llama", Layout(), **base)
    return made.model_copy(update={"folder": str(folder / "runs"), "name": name})


def start(config: RunConfig, dry: bool = False) -> str:
    """One start of a run on this rank, as train/run.py makes it; an error's text."""
    from megatrain.data.feed.training import TrainingData
    from megatrain.data.feed.validation import validation_loader, validation_sets
    from megatrain.train.dry_run import dry_run
    from megatrain.train.loop import train
    from megatrain.train.run import _claimed_folder

    engine = None
    tokens = config.model.vocab_size - config.model.vocab_padding
    try:
        sets = validation_sets(config, tokens)
        loaders = {name: validation_loader(dataset, config, 0, 1) for name, dataset in sets.items()}
        data = TrainingData(config, tokens)
        if dry:
            engine = build_engine(config)
            dry_run(config, engine, data, loaders)
            return ""
        with _claimed_folder(config) as lock:
            engine = build_engine(config)
            train(config, engine, data, loaders, lock)
        return ""
    except (CheckpointError, ConfigError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        if engine is not None:
            engine.close()


def records(folder: Path, kind: str, name: str = "first") -> list[dict[str, Any]]:
    lines = (folder / f"runs/{name}/metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.fixture
def folder(memory_path: Path) -> Path:
    make_dataset(memory_path / "data", vocab_size=300)
    make_dataset(memory_path / "other", vocab_size=300, seed=1)
    return memory_path


def test_a_finished_run_that_starts_again_does_nothing_twice(pool: Pool, folder: Path) -> None:
    assert pool.run(start, 1, config_of(folder)) == [""]
    first = records(folder, "evaluation")
    assert [(row["step"], row["set"]) for row in first] == [(4, "a")]
    assert pool.run(start, 1, config_of(folder)) == [""]
    assert records(folder, "evaluation") == first
    assert [row["step"] for row in records(folder, "done")] == [4]
    assert [row["step"] for row in records(folder, "step")] == [1, 2, 3, 4]
    # a set that was not evaluated yet is; one that was is not
    more = config_of(folder, data={"validation": {"a": str(folder / "data"), "b": str(folder / "other")}})
    assert pool.run(start, 1, more) == [""]
    assert [row["set"] for row in records(folder, "evaluation")] == ["a", "b"]


def test_fewer_steps_than_were_made_are_a_mistake(pool: Pool, folder: Path) -> None:
    assert pool.run(start, 1, config_of(folder)) == [""]
    before = {path: path.read_bytes() for path in (folder / "runs").rglob("*") if path.is_file()}
    (text,) = pool.run(start, 1, config_of(folder, steps=3))
    assert text.startswith("ConfigError: ") and "train.steps = 3" in text
    assert f"less than the 4 steps that were made already: {folder}/runs/first/checkpoints/step-00000004" in text
    assert {path: path.read_bytes() for path in (folder / "runs").rglob("*") if path.is_file()} == before


def test_a_resume_tells_what_differs_and_refuses_only_what_cannot_be_loaded(pool: Pool, folder: Path) -> None:
    mixture = {"experts.num_experts": 4, "experts.per_token": 2, "experts.hidden_size": 16}
    first = config_of(folder, model=mixture)
    assert pool.run(start, 1, first) == [""]
    changed = {"experts.capacity": 2.0, "router.balance_rate": 0.01, "attention.documents": "per_document"}
    second = config_of(
        folder, steps=5, model={**mixture, **changed}, optimizer={"lr": 2e-2}, schedule={"warmup_steps": 1}
    )
    assert pool.run(start, 1, second) == [""]
    (told,) = records(folder, "resume")
    assert {(change["key"], change["before"], change["now"], change["numbers"]) for change in told["changes"]} == {
        ("model.experts.capacity", None, 2.0, True),
        ("model.router.balance_rate", 0.0, 0.01, True),
        ("model.attention.documents", "dense", "per_document", False),
        ("optimizer.lr", 1e-2, 2e-2, True),
        ("schedule.warmup_steps", 2, 1, True),
        ("train.steps", 4, 5, False),
    }
    (text,) = pool.run(start, 1, config_of(folder, steps=6, model={**mixture, "experts.num_experts": 8}))
    assert "UnfitError" in text and "model.experts.num_experts: 4 saved, 8 asked\n" in text
    assert "model.router.balance_rate: 0.01 saved, 0.0 asked (may change)" in text


def second_phase(folder: Path, what: str, **sections: dict[str, Any]) -> RunConfig:
    load = {"load": str(folder / "runs/first/checkpoints/step-00000004"), "load_what": what, "background": False}
    changes: dict[str, dict[str, Any]] = {
        "model": {"num_layers": 1, "vocab_size": 304, "vocab_padding": 4, "max_seq_len": 32, "rope.theta": 5e5},
        "data": {"train": str(folder / "other"), "validation": {"a": str(folder / "data")}, "seq_len": 32, "seed": 5},
        "checkpoint": load,
    }
    return config_of(folder, "second", 3, **{**changes, **sections})


@pytest.mark.parametrize("what", ["weights", "weights_and_optimizer"])
def test_a_second_phase_begins_anew_with_what_was_loaded(pool: Pool, folder: Path, what: str) -> None:
    assert pool.run(start, 1, config_of(folder)) == [""]
    (text,) = pool.run(start, 1, second_phase(folder, "all"))
    assert "UnfitError" in text and "data.seq_len: 16 before, 32 now" in text and "checkpoint.load_what" in text
    (folder / "runs/second").rename(folder / "refused")
    assert pool.run(start, 1, second_phase(folder, what)) == [""]
    steps = records(folder, "step", "second")
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert steps[0]["lr"] == pytest.approx(5e-3), "the schedule begins with its warm-up"
    (resumed,) = records(folder, "resume", "second")
    assert resumed["step"] == 0
    loaded, *left, grown = resumed["report"]
    moments = "10 exp_avg, 10 exp_avg_sq"
    if what == "weights":
        assert loaded == "loaded 10 weights"
        assert left == [f"not loaded: {moments}, the update count, step 4 and the place in the data: both start anew"]
    else:
        assert loaded == f"loaded 10 weights, {moments}, the optimizer's update count (4)"
        assert left == ["not loaded: step 4 and the place in the data: both start anew"]
    assert grown == "rows 300 to 303 of the vocabulary are not in it: they keep their initial weights"
    assert {change["key"] for change in resumed["changes"]} >= {"model.rope.theta", "data.seq_len", "model.vocab_size"}
    # the run folder has checkpoints of its own by now: these count
    assert pool.run(start, 1, second_phase(folder, what, train={"steps": 4, "global_batch_size": 4})) == [""]
    assert [row["step"] for row in records(folder, "step", "second")] == [1, 2, 3, 4]


def test_a_dry_run_leaves_nothing_behind(pool: Pool, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert pool.run(start, 1, config_of(folder), True) == [""]
    assert not os.path.lexists(folder / "runs")
    assert pool.run(start, 1, config_of(folder)) == [""]
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*")}
    assert pool.run(start, 1, config_of(folder, steps=8), True) == [""]
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*")} == before
    assert [path.name for path in list_checkpoints(folder / "runs/first/checkpoints")] == ["step-00000004"]


def building_with_rules(*patterns: str) -> str:
    rules = [{"pattern": pattern, "lr_scale": 0.5} for pattern in patterns]
    try:
        build_engine(run_config("llama", Layout(pp=2), optimizer={"rules": rules})).close()
        return ""
    except ConfigError as error:
        return str(error)


def test_a_rule_that_fits_no_parameter_is_refused_on_every_rank(pool: Pool) -> None:
    """A rank of a pipeline has only some of the parameters: a rule fits if it fits on any."""
    assert pool.run(building_with_rules, 2, "embedding.*", "head.weight") == ["", ""]
    for text in pool.run(building_with_rules, 2, "embedding.*", "layers.*.attn.*"):
        assert "optimizer.rules.1.pattern = layers.*.attn.*" in text and "optimizer.rules.0" not in text
        assert "fits no parameter of this model" in text and "such as layers." in text
