"""What the loop makes of its checkpoints: failed saves, damaged ones, remains, a second job."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatrain.checkpoint.store.errors import CheckpointError
from megatrain.checkpoint.store.folder import list_checkpoints
from megatrain.checkpoint.tools.rebuild import rebuild_manifest
from megatrain.config.schema import RunConfig
from tests.checkpoint.test_store_damage import flip
from tests.data.factory import make_dataset
from tests.layouts import Layout, build_engine, run_config
from tests.pool import Pool


def config_of(folder: Path, steps: int, **checkpoint: Any) -> RunConfig:
    made = run_config(
        "llama",
        Layout(dp=2, zero_stage=1),
        model={"num_layers": 1, "vocab_size": 300},
        train={"steps": steps, "log_every": 1, "eval_batches": 1, "global_batch_size": 16, "micro_batch_size": 2},
        data={"train": str(folder / "data"), "seq_len": 16},
        checkpoint={"save_every": 2, **checkpoint},
    )
    return made.model_copy(update={"folder": str(folder / "runs"), "name": "test"})


def train(config: RunConfig, failing_saves: tuple[int, ...] = ()) -> str:
    """A whole run on this rank; the saves of ``failing_saves`` find no room. Returns an error's text."""
    from megatrain.checkpoint.save import Saver
    from megatrain.data.feed.training import TrainingData
    from megatrain.train import loop
    from megatrain.train.run import _claimed_folder

    original = Saver._prepare

    def prepare(self: Any, writer: Any) -> Any:
        if writer.step in failing_saves:
            raise CheckpointError(f"no room for step {writer.step}")
        return original(self, writer)

    Saver._prepare = prepare  # type: ignore[method-assign]
    engine = None
    try:
        with _claimed_folder(config) as lock:
            engine = build_engine(config)
            loop.train(config, engine, TrainingData(config, 300), {}, lock)
        return ""
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        Saver._prepare = original  # type: ignore[method-assign]
        if engine is not None:
            engine.close()


@pytest.fixture
def folder(memory_path: Path) -> Path:
    make_dataset(memory_path / "data", vocab_size=300)
    return memory_path


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "runs/test/metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def steps_on_disk(folder: Path) -> list[int]:
    return [int(path.name[-8:]) for path in list_checkpoints(folder / "runs/test/checkpoints")]


def test_a_run_survives_failed_saves_and_ends_when_they_repeat(pool: Pool, folder: Path) -> None:
    assert pool.run(train, 2, config_of(folder, 6), (2, 4)) == ["", ""]
    saves = records(folder, "checkpoint")
    assert [(save["saved_step"], save["failed"]) for save in saves] == [(2, True), (4, True), (6, False)]
    assert "no room for step 2" in saves[0]["problem"]
    assert steps_on_disk(folder) == [6]
    texts = pool.run(train, 2, config_of(folder, 20, max_failures=2), (10, 12))
    assert "StorageError: 2 checkpoints in a row were not saved, the last one of step 12" in texts[0] == texts[1]
    assert steps_on_disk(folder) == [6, 8]
    assert max(record["step"] for record in records(folder, "step")) < 15, "it ended soon after"
    texts = pool.run(train, 2, config_of(folder, 9), (9,))
    assert "StorageError: step 9, the last of this start, was not saved" in texts[0] == texts[1]


def test_a_damaged_checkpoint_is_skipped_aloud(pool: Pool, folder: Path) -> None:
    assert pool.run(train, 2, config_of(folder, 6)) == ["", ""]
    straight = [record["loss"] for record in records(folder, "step")]
    checkpoints = folder / "runs/test/checkpoints"
    chunk = next((checkpoints / "step-00000006/tensors/exp_avg").rglob("c.*"))
    flip(chunk, 77)
    next((checkpoints / "step-00000004/tensors/weight").rglob("c.*")).unlink()
    assert pool.run(train, 2, config_of(folder, 6, keep_last=2)) == ["", ""]
    found = records(folder, "damaged")
    assert [Path(record["path"]).name for record in found] == ["step-00000006", "step-00000004"]
    assert [record["newest_good_step"] for record in found] == [2, 2]
    assert str(chunk) in found[0]["problem"]
    assert [record["loss"] for record in records(folder, "step")] == straight, "made again, bit for bit"
    assert [record["other_versions"] for record in records(folder, "resume")] == [[]]
    assert steps_on_disk(folder) == [4, 6], "both were saved again, and step 2 given up"


def test_a_lost_manifest_is_told_and_the_step_set_aside(pool: Pool, folder: Path) -> None:
    """By every rank's arrays: each names its run, so that the manifest can be made again."""
    assert pool.run(train, 2, config_of(folder, 4)) == ["", ""]
    newest = folder / "runs/test/checkpoints/step-00000004"
    run_id = (folder / "runs/test/run_id").read_text().strip()
    headers = [json.loads(path.read_text()) for path in (newest / "tensors").glob("*/*/zarr.json")]
    assert {header["attributes"]["run_id"] for header in headers} == {run_id}
    manifest = (newest / "manifest.json").read_bytes()
    (newest / "manifest.json").unlink()
    assert pool.run(train, 2, config_of(folder, 4)) == ["", ""]
    (found,) = records(folder, "damaged")
    assert f"launch/checkpoint.py rebuild {newest}" in found["problem"]
    assert found["newest_good_step"] == 2
    aside = newest.with_name("set-aside-1-step-00000004")
    assert any(str(aside) in record["note"] for record in records(folder, "checkpoint_note"))
    rebuild_manifest(aside)
    assert (aside / "manifest.json").read_bytes() == manifest


@pytest.mark.parametrize("remains", ["all damaged", "no manifest", "latest only"])
def test_no_silent_fresh_start(pool: Pool, folder: Path, remains: str) -> None:
    assert pool.run(train, 2, config_of(folder, 2)) == ["", ""]
    checkpoints = folder / "runs/test/checkpoints"
    if remains == "all damaged":
        flip(checkpoints / "step-00000002/manifest.json", 99)
    elif remains == "no manifest":
        (checkpoints / "step-00000002/manifest.json").unlink()
    else:
        (checkpoints / "step-00000002").rename(folder / "elsewhere")
    before = (folder / "runs/test/metrics.jsonl").read_bytes()
    texts = pool.run(train, 2, config_of(folder, 4))
    assert "checkpoint.resume: restart" in texts[0] == texts[1]
    assert (folder / "runs/test/metrics.jsonl").read_bytes() == before
    assert pool.run(train, 2, config_of(folder, 4, resume="restart")) == ["", ""]
    assert steps_on_disk(folder) == [2, 4]
    assert (checkpoints / "set-aside-1" / "latest").exists()


def test_resume_never_and_an_empty_folder(pool: Pool, folder: Path) -> None:
    (folder / "runs/test/checkpoints/.step-00000002.partial").mkdir(parents=True)  # of a first save that was killed
    assert pool.run(train, 2, config_of(folder, 2, resume="never")) == ["", ""]
    notes = [record["note"] for record in records(folder, "checkpoint_note")]
    assert len(notes) == 1
    assert ".step-00000002.partial, left by a save that was killed" in notes[0]
    texts = pool.run(train, 2, config_of(folder, 4, resume="never"))
    assert "checkpoint.resume is never" in texts[0] == texts[1]
    assert steps_on_disk(folder) == [2]


def test_the_lock_is_given_back(pool: Pool, folder: Path) -> None:
    assert pool.run(train, 2, config_of(folder, 2)) == ["", ""]
    assert not (folder / "runs/test/checkpoints/owner.json").exists()
