"""launch/checkpoint.py: what each command prints, finds and writes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from launch.checkpoint import main
from megatrain.checkpoint.store.arrays import CheckpointReader
from megatrain.checkpoint.store.errors import CheckpointError
from megatrain.checkpoint.store.folder import list_checkpoints
from megatrain.checkpoint.store.lock import FolderLock
from megatrain.checkpoint.tools.merge import ema_factors
from megatrain.checkpoint.tools.rebuild import rebuild_manifest
from megatrain.convert.formats import detect
from tests.checkpoint.test_store import sample, save, small_save
from tests.checkpoint.test_store_damage import flip

UP, NORM = "layers.10.mlp.up.weight", "layers.9.norm.weight"


def save_model(folder: Path, step: int, seed: int = 0, up_chunk: tuple[int, int] = (4, 3)) -> Path:
    arrays = {UP: (sample(8, 6, seed=seed), up_chunk), NORM: (sample(5, seed=1), (2,))}
    return save(folder, step, arrays, run_id="run-a", state={"model": {"layers": 11}, "tokens": 1000 * step})


def output_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def test_ls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (20, 3):
        save_model(tmp_path / "checkpoints", step)
    code, text = output_of(capsys, "ls", tmp_path)
    lines = text.splitlines()
    assert code == 0
    assert [line.split()[0] for line in lines] == ["step-00000003", "step-00000020", "2"]
    assert "20,000 tokens  run run-a" in lines[1]
    (tmp_path / "checkpoints/step-00000020/tensors/weight" / UP / "c.0.0").unlink()
    (tmp_path / "checkpoints/step-00000030").mkdir()
    code, text = output_of(capsys, "ls", tmp_path / "checkpoints")
    assert code == 1
    assert f"step-00000020  DAMAGED  {tmp_path}" in text
    assert "c.0.0 is missing" in text
    assert "step-00000030  not a checkpoint" in text


def test_verify_names_every_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, other = save_model(tmp_path, 1, seed=1), save_model(tmp_path, 2, seed=2)
    assert output_of(capsys, "verify", path, other) == (0, f"{path}: whole\n{other}: whole\n")
    arrays = other / "tensors/weight"
    flip(arrays / UP / "c.0.1", 77)
    shutil.copy(path / "tensors/weight" / UP / "c.1.0", arrays / UP / "c.1.0")
    shutil.copy(arrays / UP / "c.0.0", arrays / UP / "c.1.1")
    code, text = output_of(capsys, "verify", tmp_path, "--threads", "2")
    assert code == 1
    assert "c.0.1 is damaged: the data does not match its CRC" in text
    assert "c.1.0 is whole but not the chunk that was saved here: it is that of step 1, run run-a" in text
    assert f"c.1.1 is whole but not the chunk that was saved here: it is c.0.0 of weight of {UP}" in text
    assert f"{other}: 3 problems" in text


def test_diff(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = save_model(tmp_path / "a", 1), save_model(tmp_path / "b", 1, up_chunk=(8, 2))
    assert output_of(capsys, "diff", one, two) == (0, "2 of 2 tensors are bit-equal, 0 differ\n")
    changed = sample(8, 6)
    changed[7, 5] += 8
    scale = np.abs(sample(8, 6)).max()
    third = save(tmp_path / "c", 1, {UP: (changed, (8, 6)), "extra": (sample(2), (2,))})
    code, text = output_of(capsys, "diff", one, third, "--all")
    assert code == 1
    assert f"max 8.000e+00  relative {8 / scale:.3e}" in text
    assert f"{NORM:<50} only in the first" in text
    assert f"{'extra':<50} only in the second" in text
    nan = sample(8, 6)
    nan[0, 0] = np.nan
    fourth = save(tmp_path / "d", 1, {UP: (nan, (8, 6)), NORM: (sample(5, seed=1), (5,))})
    code, text = output_of(capsys, "diff", one, fourth)
    assert (code, "max nan" in text) == (1, True)
    assert output_of(capsys, "diff", fourth, fourth)[0] == 0, "the same bits, NaN or not"


def test_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = output_of(capsys, "show", save_model(tmp_path, 7))
    assert code == 0
    assert [line.split()[0] for line in text.splitlines()] == [
        "layers",
        "9",
        "norm",
        "weight",
        "10",
        "mlp",
        "up",
        "weight",
        "2",
    ]
    assert "212 bytes" in text.splitlines()[0]
    assert "8 x 6  weight float32" in text
    assert "2 arrays, 212 bytes; step 7, run run-a" in text


def test_prune(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in range(1, 7):
        small_save(tmp_path, step)
    flip(tmp_path / "step-00000006/manifest.json", 5)
    rule = ["--keep-last", 2, "--keep-every", 3]
    assert output_of(capsys, "prune", tmp_path, *rule, "--dry-run")[1].count("would remove") == 2
    with FolderLock(tmp_path):
        code, text = output_of(capsys, "prune", tmp_path, *rule)
        assert (code, "belongs to process" in text) == (2, True)
    assert len(list_checkpoints(tmp_path)) == 6
    code, text = output_of(capsys, "prune", tmp_path, *rule)
    assert "step-00000006: it is damaged" in text
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["3", "4", "5", "6"]


def test_merge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [save_model(tmp_path / "run", step, seed=step, up_chunk=(4, 6 // step)) for step in (1, 2, 3)]
    assert output_of(capsys, "merge", *paths, "--output", tmp_path / "mean")[0] == 0
    merged = CheckpointReader(tmp_path / "mean" / "step-00000003")
    parts = [sample(8, 6, seed=step) for step in (1, 2, 3)]
    np.testing.assert_array_equal(merged.read("weight", UP), np.mean(np.float64(parts), axis=0).astype(np.float32))
    np.testing.assert_array_equal(merged.read("weight", NORM), sample(5, seed=1))
    assert [entry["step"] for entry in merged.state["merged_from"]] == [1, 2, 3]
    assert output_of(capsys, "merge", *paths, "--output", tmp_path / "ema", "--ema", "0.9")[0] == 0
    moving = np.float64(parts[0])
    for part in parts[1:]:
        moving = 0.9 * moving + 0.1 * part
    found = CheckpointReader(tmp_path / "ema" / "step-00000003").read("weight", UP)
    np.testing.assert_allclose(found, moving, rtol=1e-6)  # FP32, and the factors are multiplied out
    assert sum(ema_factors(5, 0.9)) == pytest.approx(1.0)
    stranger = small_save(tmp_path / "other")
    code, text = output_of(capsys, "merge", paths[0], stranger, "--output", tmp_path / "x")
    assert (code, "different models" in text) == (2, True)


def test_a_merge_of_a_damaged_one_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = save_model(tmp_path / "a", 1), save_model(tmp_path / "b", 1)
    flip(two / "tensors/weight" / UP / "c.1.1", 3)
    code, text = output_of(capsys, "merge", one, two, "--output", tmp_path / "out")
    assert (code, "c.1.1 is damaged" in text) == (2, True)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("loss", ["deleted", "damaged"])
def test_rebuild(tmp_path: Path, capsys: pytest.CaptureFixture[str], loss: str) -> None:
    path = save_model(tmp_path, 5)
    before = (path / "manifest.json").read_bytes()
    (path / "manifest.json").unlink() if loss == "deleted" else (path / "manifest.json").write_bytes(b"{}")
    assert output_of(capsys, "rebuild", path)[0] == 0
    assert (path / "manifest.json").read_bytes() == before
    CheckpointReader(path).require_files()


def edit_header(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda arrays: flip(arrays / "weight" / UP / "c.0.0", 9), r"c\.0\.0 is damaged"),
        (lambda arrays: (arrays / "weight" / UP / "c.0.0").unlink(), r"c\.0\.0 is missing"),
        (lambda arrays: shutil.rmtree(arrays / "weight" / UP), "zarr.json: No such file"),
        (lambda arrays: shutil.rmtree(arrays / "weight"), "zarr.json: No such file"),
        (lambda arrays: (arrays / "weight" / UP / "zarr.json").unlink(), "zarr.json: No such file"),
        (lambda arrays: edit_header(arrays / "weight" / UP / "zarr.json", shape=[8]), "do not cut"),
        (lambda arrays: edit_header(arrays / "weight" / UP / "zarr.json", shape=[2**40, 6]), "is missing"),
        (lambda arrays: edit_header(arrays / "weight" / UP / "zarr.json", data_type="object"), "is not stored"),
        (
            lambda arrays: edit_header(arrays / "weight" / UP / "zarr.json", attributes={"step": 4, "run_id": "b"}),
            "step 4",
        ),
        (lambda arrays: edit_header(arrays / "zarr.json", attributes={}), "does not tell the state"),
        (lambda arrays: (arrays / "zarr.json").write_text("[" * 100_000), "damaged"),
    ],
)
def test_rebuild_refuses_what_is_not_whole(tmp_path: Path, damage, message: str) -> None:
    path = save_model(tmp_path, 5)
    (path / "manifest.json").unlink()
    damage(path / "tensors")
    with pytest.raises(CheckpointError, match=message):
        rebuild_manifest(path)
    assert not (path / "manifest.json").exists()


def test_a_whole_manifest_is_not_rebuilt_and_older_ones_stay(tmp_path: Path) -> None:
    path = save_model(tmp_path, 5)
    with pytest.raises(CheckpointError, match=r"manifest\.json is whole: nothing to rebuild"):
        rebuild_manifest(path)
    for torn in (b"first", b"second"):
        (path / "manifest.json").write_bytes(torn)
        rebuild_manifest(path)
    assert (path / "manifest.json.replaced").read_bytes() == b"first"
    assert (path / "manifest.json.replaced-2").read_bytes() == b"second"


def test_a_run_that_goes_on_is_not_rebuilt_under(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_model(tmp_path, 5)
    (path / "manifest.json").unlink()
    with FolderLock(tmp_path):
        code, text = output_of(capsys, "rebuild", path)
    assert (code, "belongs to process" in text) == (2, True)


def test_arrays_of_ranks_that_did_not_know_their_run_are_rebuilt(tmp_path: Path) -> None:
    """Checkpoints of earlier versions: only rank 0 wrote its run's id."""
    path = save_model(tmp_path, 5)
    edit_header(path / "tensors/weight" / UP / "zarr.json", attributes={"step": 5, "run_id": ""})
    (path / "manifest.json").unlink()
    assert rebuild_manifest(path).run_id == "run-a"
    (path / "manifest.json").unlink()
    edit_header(path / "tensors/weight" / UP / "zarr.json", attributes={"step": 4, "run_id": ""})
    with pytest.raises(CheckpointError, match="step 4"):
        rebuild_manifest(path)


def test_a_merge_replaces_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [save_model(tmp_path / "run", step, seed=step) for step in (1, 2)]
    before = (paths[1] / "manifest.json").read_bytes()
    merged = ["merge", *paths, "--output", tmp_path / "mean"]
    assert output_of(capsys, *merged)[0] == 0
    for output in (tmp_path / "run", tmp_path / "mean"):
        code, text = output_of(capsys, "merge", *paths, "--output", output)
        assert (code, f"{output}/step-00000002 is there already (a folder)" in text) == (2, True)
        assert "choose another --output" in text
    assert (paths[1] / "manifest.json").read_bytes() == before
    dangling = tmp_path / "link" / "step-00000002"
    dangling.parent.mkdir()
    dangling.symlink_to("nowhere")
    assert output_of(capsys, "merge", *paths, "--output", tmp_path / "link")[0] == 2
    assert dangling.is_symlink()


@pytest.mark.parametrize("decay", ["1", "1.5", "-0.1", "nan", "inf", "half"])
def test_a_decay_that_is_none_is_refused_at_the_start(decay: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["merge", "nowhere", "--output", "nowhere", f"--ema={decay}"])
    assert ended.value.code == 2
    assert f"{decay} is no decay: a number from 0 to below 1" in capsys.readouterr().err


def test_verify_goes_on_after_the_first_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torn, whole, lost = (save_model(tmp_path, step) for step in (1, 2, 3))
    (torn / "manifest.json").write_bytes(b"{}")
    (lost / "manifest.json").unlink()
    code, text = output_of(capsys, "verify", torn, lost, whole)
    assert code == 1
    assert f"{torn}: 1 problems" in text
    assert f"{lost} was never committed" in text
    assert f"rebuild {lost}" in text
    assert f"{whole}: whole" in text
    code, text = output_of(capsys, "verify", tmp_path / "nowhere", whole)
    assert (code, f"{whole}: whole" in text, "no such folder" in text) == (2, True, True)


def test_a_checkpoint_is_one_under_any_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    path = save_model(run / "checkpoints", 2)
    shutil.copytree(path, tmp_path / "best")
    (tmp_path / "linked").symlink_to(path)
    (tmp_path / "step-00000099").symlink_to(path)
    names = ["best", "linked", "step-00000099", "run", "run/checkpoints"]
    for name in names:
        assert output_of(capsys, "verify", tmp_path / name)[0] == 0, name
        assert detect(tmp_path / name) == "megatrain", name
    (tmp_path / "empty").mkdir()
    code, text = output_of(capsys, "verify", tmp_path / "empty")
    assert (code, "empty holds no checkpoint yet" in text) == (2, True)
    (tmp_path / "file").touch()
    code, text = output_of(capsys, "show", tmp_path / "file")
    assert (code, "file is a file, not the folder of a checkpoint" in text) == (2, True)


def test_mistakes_get_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["ls", tmp_path / "nowhere"], ["verify", tmp_path], ["show", tmp_path / "step-00000001"]):
        code, text = output_of(capsys, *arguments)
        assert (code, text.count("error: ")) == (2, 1)
