"""What is written comes back: any grid, any region, by our reader and by zarr-python's."""

import json
import os
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatrain.checkpoint.store import folder as layout
from megatrain.checkpoint.store.arrays import CheckpointReader, CheckpointWriter
from megatrain.checkpoint.store.errors import CheckpointError
from megatrain.checkpoint.store.folder import list_checkpoints, newest_checkpoint, remove_checkpoint, require_free_space
from megatrain.checkpoint.store.retention import Retention, prune

VERSIONS = {"python": "3"}


def cut(array, chunk_shape):
    """(offset, part) for every chunk of the grid."""
    for offset in product(*(range(0, dim, size) for dim, size in zip(array.shape, chunk_shape, strict=True))):
        yield offset, array[tuple(slice(o, o + size) for o, size in zip(offset, chunk_shape, strict=True))]


def write_array(writer, name, array, chunk_shape, kind="weight"):
    for offset, part in cut(array, chunk_shape):
        writer.write(kind, name, part, offset=offset, full_shape=array.shape, chunk_shape=chunk_shape)


def save(folder, step, arrays, run_id="run", state=None):
    """A committed checkpoint of ``{name: (array, chunk_shape)}``."""
    writer = CheckpointWriter(folder, step, run_id)
    writer.prepare()
    for name, (array, chunk_shape) in arrays.items():
        write_array(writer, name, array, chunk_shape)
    return writer.commit(writer.records(), state or {}, VERSIONS)


def sample(*shape, seed=0, dtype=np.float32):
    return (np.random.default_rng(seed).standard_normal(shape) * 100).astype(dtype)


def small_save(folder, step=1, seed=0):
    return save(folder, step, {"layers.0.weight": (sample(4, 6, seed=seed), (2, 6))})


@st.composite
def regions(draw):
    """A shape, a chunk shape, and a region inside."""
    shape = draw(st.lists(st.integers(1, 7), max_size=3))
    chunk = [draw(st.integers(1, dim)) for dim in shape]
    offset = [draw(st.integers(0, dim - 1)) for dim in shape]
    size = [draw(st.integers(1, dim - begin)) for dim, begin in zip(shape, offset, strict=True)]
    return tuple(map(tuple, (shape, chunk, offset, size)))


@settings(max_examples=25, deadline=None)
@given(regions(), st.sampled_from([np.float32, np.int64]))
def test_any_region_of_any_grid(tmp_path_factory, case, dtype):
    shape, chunk_shape, offset, size = case
    array = sample(*shape, dtype=dtype) if shape else np.array(7, dtype)
    reader = CheckpointReader(save(tmp_path_factory.mktemp("any"), 1, {"w": (array, chunk_shape)}))
    region = reader.read("weight", "w", offset, size)
    wanted = array[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]
    assert region.dtype == dtype
    assert region.shape == size
    np.testing.assert_array_equal(region, wanted)
    np.testing.assert_array_equal(reader.read("weight", "w"), array)


def test_ranks_write_their_own_parts(tmp_path):
    full = {kind: sample(8, 6, seed=seed) for seed, kind in enumerate(("weight", "exp_avg", "exp_avg_sq"))}
    ranks = [CheckpointWriter(tmp_path / "run" / "checkpoints", 1000, "run-a") for _ in range(4)]
    ranks[0].prepare()
    for kind, array in full.items():
        for rank, (offset, part) in zip(ranks, cut(array, (4, 3)), strict=True):
            rank.write(kind, "layers.0.mlp.up.weight", part.T.copy().T, offset=np.array(offset), full_shape=array.shape)
    state = {"rng": [1, 2], "schedule": {"lr": 0.1}, "text": "Größe"}
    records = json.loads(json.dumps([record for rank in ranks for record in rank.records()]))
    path = ranks[0].commit(records, state, VERSIONS)
    assert path.name == "step-00001000"
    assert [entry.name for entry in sorted(path.parent.iterdir())] == ["latest", "step-00001000"]
    assert (path.parent / "latest").read_text() == "step-00001000\n"
    reader = CheckpointReader(path)
    reader.require_files()
    assert (reader.step, reader.run_id, reader.versions, reader.state) == (1000, "run-a", VERSIONS, state)
    for kind, array in full.items():
        assert reader.arrays[kind, "layers.0.mlp.up.weight"].shape == (8, 6)
        np.testing.assert_array_equal(reader.read(kind, "layers.0.mlp.up.weight"), array)


def test_only_the_chunks_of_the_region_are_opened(tmp_path):
    path = small_save(tmp_path)
    (path / "tensors/weight/layers.0.weight/c.1.0").unlink()
    reader = CheckpointReader(path)
    np.testing.assert_array_equal(reader.read("weight", "layers.0.weight", (0, 1), (2, 3)), sample(4, 6)[:2, 1:4])
    with pytest.raises(CheckpointError, match=r"c\.1\.0 is missing"):
        reader.read("weight", "layers.0.weight", (1, 0))


def test_other_readers_open_it(tmp_path):
    zarr = pytest.importorskip("zarr")
    arrays = {
        "even": (sample(8, 6), (4, 3)),
        "edge": (sample(7, 5), (4, 2)),
        "scalar": (np.array(3.5, np.float32), ()),
        "ints": (np.arange(-5, 6), (4,)),
    }
    path = save(tmp_path, 1, arrays, run_id="run-a")
    group = zarr.open_group(path / "tensors", mode="r")["weight"]
    for name, (array, chunk_shape) in arrays.items():
        np.testing.assert_array_equal(group[name][...], array)
        assert group[name].chunks == chunk_shape
        assert dict(group[name].attrs) == {"step": 1, "run_id": "run-a"}
    (path / "tensors/weight/even/c.0.0").unlink()
    assert np.isnan(group["even"][:4, :3]).all()  # lost is not zero


def test_tensorstore_opens_it(tmp_path):
    tensorstore = pytest.importorskip("tensorstore")
    arrays = {"even": (sample(8, 6), (4, 3)), "edge": (sample(7, 5), (4, 2)), "ints": (np.arange(-5, 6), (4,))}
    path = save(tmp_path, 1, arrays)
    for name, (array, chunk_shape) in arrays.items():
        place = path / "tensors/weight" / name
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{place}/"}}
        opened = tensorstore.open(spec, open=True).result()
        np.testing.assert_array_equal(opened.read().result(), array)
        assert opened.chunk_layout.read_chunk.shape == chunk_shape
    chunk = path / "tensors/weight/even/c.0.0"
    chunk.write_bytes(chunk.read_bytes()[:-1] + b"?")
    opened = tensorstore.open(
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{chunk.parent}/"}}, open=True
    ).result()
    with pytest.raises(ValueError, match="Digest mismatch"):
        opened.read().result()


def test_the_state_is_strict_json(tmp_path):
    old = small_save(tmp_path, 1)
    for state in ({"x": object()}, {"x": float("nan")}):
        with pytest.raises(CheckpointError, match="JSON"):
            save(tmp_path, 2, {}, state=state)
    assert newest_checkpoint(tmp_path) == old


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        (sample(2, 6).astype(np.float16), {}, "float16"),
        (sample(2, 6).astype(">f4"), {}, ">f4"),
        (sample(2, 6), {"offset": (1, 0)}, "not a chunk"),
        (sample(2, 6), {"offset": (4, 0)}, "not a chunk"),
        (sample(2, 6), {"offset": (0,)}, "not a chunk"),
        (sample(1, 6), {"chunk_shape": (2, 6)}, "not a chunk"),
        (sample(8, 6), {}, "do not cut"),
        (sample(2, 0), {}, "do not cut"),
        (sample(2), {}, "do not cut"),
        (sample(2, 6), {"name": "../w"}, "not allowed"),
        (sample(2, 6), {"kind": ".."}, "not allowed"),
    ],
)
def test_a_part_that_does_not_fit_is_refused(tmp_path, part, options, message):
    writer = CheckpointWriter(tmp_path, 1, "run")
    writer.prepare()
    options = {"kind": "weight", "name": "w", "offset": (0, 0), "full_shape": (4, 6)} | options
    with pytest.raises(CheckpointError, match=message):
        writer.write(part=part, **options)
    assert not list(writer.partial.iterdir())


def test_a_part_written_twice_or_never_is_refused(tmp_path):
    first, second = (CheckpointWriter(tmp_path, 1, "run") for _ in range(2))
    first.prepare()
    half = {"offset": (0,), "full_shape": (4,)}
    first.write("weight", "w", sample(2), **half)
    with pytest.raises(CheckpointError, match="already"):
        first.write("weight", "w", sample(2), **half)
    with pytest.raises(CheckpointError, match=r"weight of w: 1 chunks .* missing: c\.1"):
        first.commit(first.records(), {}, VERSIONS)
    second.write("weight", "w", sample(2), **half)
    with pytest.raises(CheckpointError, match="two ranks"):
        first.commit(first.records() + second.records(), {}, VERSIONS)
    other = CheckpointWriter(tmp_path, 1, "run")
    other.write("weight", "w", sample(1), offset=(3,), full_shape=(4,))
    with pytest.raises(CheckpointError, match="disagree"):
        first.commit(first.records() + other.records(), {}, VERSIONS)
    second.write("weight", "w", sample(2), offset=(2,), full_shape=(4,))
    second.records()  # waits for the disk
    (second.partial / "tensors/weight/w/c.1").unlink()
    with pytest.raises(CheckpointError, match=r"c\.1 is missing"):
        second.commit(second.records(), {}, VERSIONS)
    assert newest_checkpoint(tmp_path) is None
    first.discard()
    assert not list(tmp_path.iterdir())


def test_regions_and_arrays_that_are_not_there(tmp_path):
    reader = CheckpointReader(small_save(tmp_path))
    for offset, shape in [((3, 0), (2, 6)), ((-1, 0), (1, 1)), ((0, 0), (0, 1)), ((0,), None), (None, (4,))]:
        with pytest.raises(CheckpointError, match="not inside"):
            reader.read("weight", "layers.0.weight", offset, shape)
    with pytest.raises(CheckpointError, match=r"holds no exp_avg of layers\.0\.weight"):
        reader.read("exp_avg", "layers.0.weight")


def test_newest_is_by_step_and_ignores_all_but_committed(tmp_path):
    assert newest_checkpoint(tmp_path / "nowhere") is None
    steps = [100_000_000, 20, 3]
    for step in steps:
        small_save(tmp_path, step)
    (tmp_path / "step-00000999").mkdir()  # no manifest
    (tmp_path / "step-999999999.old").mkdir()
    for latest in (None, b"", b"step-000", b"\xff\x00"):
        (tmp_path / "latest").unlink(missing_ok=True)
        if latest is not None:
            (tmp_path / "latest").write_bytes(latest)
        assert newest_checkpoint(tmp_path) == tmp_path / "step-100000000"
    assert [layout.step_of(path.name) for path in list_checkpoints(tmp_path)] == sorted(steps)
    remove_checkpoint(tmp_path / "step-100000000")
    assert newest_checkpoint(tmp_path) == tmp_path / "step-00000020"
    with pytest.raises(CheckpointError, match="not named like a checkpoint"):
        remove_checkpoint(tmp_path)


def test_wrong_clocks_change_no_order(tmp_path):
    """The newest step looks the oldest, a stump and an old step come from the future."""
    for step in (1, 2, 3):
        small_save(tmp_path, step)
    (tmp_path / ".step-00000004.partial").mkdir()
    now = time.time()
    for name, skew in {"step-00000003": -7200, "step-00000001": 3600, ".step-00000004.partial": 7200}.items():
        for path in [*(tmp_path / name).rglob("*"), tmp_path / name]:
            os.utime(path, (now + skew, now + skew))
    assert newest_checkpoint(tmp_path) == tmp_path / "step-00000003"
    CheckpointReader(tmp_path / "step-00000003").require_files()
    assert prune(tmp_path, Retention(keep_last=2), set()) == [tmp_path / "step-00000001"]
    small_save(tmp_path, 4)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003", "step-00000004"]


def test_the_same_step_is_replaced(tmp_path):
    small_save(tmp_path, 5, seed=1)
    path = small_save(tmp_path, 5, seed=2)
    np.testing.assert_array_equal(CheckpointReader(path).read("weight", "layers.0.weight"), sample(4, 6, seed=2))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", path.name]


def test_the_hint_may_fail(tmp_path):
    (tmp_path / "latest").mkdir()
    path = small_save(tmp_path)
    assert newest_checkpoint(tmp_path) == path


def test_free_space(tmp_path, monkeypatch):
    require_free_space(tmp_path / "not" / "yet", 1)
    monkeypatch.setattr(layout.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match=r"not/yet.* 1001 bytes .* 1000 bytes"):
        require_free_space(tmp_path / "not" / "yet", 1001)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_is_explained(tmp_path):
    old = small_save(tmp_path, 1)
    writer = CheckpointWriter(tmp_path, 2, "run")
    writer.prepare()
    chunk = writer.partial / "tensors/weight/w/c.0"
    chunk.parent.mkdir(parents=True)
    chunk.symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"weight of w .*c\.0: No space left on device \(ENOSPC\)"):
        writer.write("weight", "w", sample(1 << 16), offset=(0,), full_shape=(1 << 16,))
        writer.records()  # a thread writes: it is told here at the latest
    writer.discard()
    assert newest_checkpoint(tmp_path) == old
