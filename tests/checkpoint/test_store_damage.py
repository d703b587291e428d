"""Nothing that is damaged, foreign or hostile loads, and the error says what and where."""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
from awscrt.checksums import crc32c

from megatrain.checkpoint.store.arrays import CheckpointReader
from megatrain.checkpoint.store.errors import CheckpointError
from tests.checkpoint.payload import Payload
from tests.checkpoint.test_store import sample, save, small_save

NAME = "layers.0.weight"
CHUNK = f"tensors/weight/{NAME}/c.0.0"
OTHER = f"tensors/weight/{NAME}/c.1.0"


def load_all(path):
    reader = CheckpointReader(path)
    return [reader.read(*key) for key in reader.arrays]


def rewrite(path, change):
    """Edits the manifest as an attacker would: with a CRC that is right."""
    fields = json.loads((path / "manifest.json").read_bytes())
    del fields["crc32c"]
    change(fields)
    body = json.dumps(fields).encode()[:-1]
    (path / "manifest.json").write_bytes(body + b',\n"crc32c": "%08x"\n}\n' % crc32c(body))


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def test_the_edits_of_these_tests_keep_a_good_checkpoint_good(tmp_path):
    path = small_save(tmp_path)
    rewrite(path, lambda fields: None)
    np.testing.assert_array_equal(load_all(path)[0], sample(4, 6))


@pytest.mark.parametrize("bit", [0, 100, 8 * 47 + 7, 8 * 48, 8 * 52 - 1])
def test_any_flipped_bit(tmp_path, bit):
    path = small_save(tmp_path)
    flip(path / CHUNK, bit)
    with pytest.raises(CheckpointError, match=rf"weight of {NAME}: .*c\.0\.0 is damaged"):
        load_all(path)


@pytest.mark.parametrize("size", [0, 4, 51, 53])
def test_another_size(tmp_path, size):
    path = small_save(tmp_path)
    os.truncate(path / CHUNK, size)
    with pytest.raises(CheckpointError, match=rf"weight of {NAME}: .*c\.0\.0 has {size} bytes instead of 52"):
        load_all(path)


def replace_by_a_link(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


DAMAGES = {
    "flipped": (lambda path: flip(path / CHUNK, 100), r"c\.0\.0 is damaged"),
    "truncated": (lambda path: os.truncate(path / CHUNK, 51), r"c\.0\.0 has 51 bytes instead of 52"),
    "longer": (lambda path: os.truncate(path / CHUNK, 53), r"c\.0\.0 has 53 bytes instead of 52"),
    "missing": (lambda path: (path / CHUNK).unlink(), r"c\.0\.0: No such file"),
    "link": (lambda path: replace_by_a_link(path / CHUNK), "a link leads elsewhere"),
    "folder_link": (lambda path: replace_by_a_link((path / CHUNK).parent), "a link leads elsewhere"),
    "pipe": (lambda path: ((path / CHUNK).unlink(), os.mkfifo(path / CHUNK)), "not a regular file"),
    "foreign": (lambda path: shutil.copy(path / OTHER, path / CHUNK), r"c\.0\.0 is whole but not the chunk"),
}


@pytest.mark.timeout(10)
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("offset", [0, 1], ids=["whole_chunks", "parts_of_chunks"])
def test_nothing_damaged_is_read_into_given_memory(tmp_path, damage, offset):
    path = small_save(tmp_path)
    make, message = DAMAGES[damage]
    make(path)
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(path).read("weight", NAME, (offset, 0), out=np.empty((4 - offset, 6), np.float32))


def test_memory_is_taken_only_for_chunks_of_their_size(tmp_path):
    path = small_save(tmp_path)
    rewrite(path, HOSTILE["huge_chunk"][0])
    with pytest.raises(CheckpointError, match="instead of 13194139533316"):  # 2^39 rows of 6 FP32, and the CRC
        CheckpointReader(path).read("weight", NAME, shape=(1, 6), out=np.empty((1, 6), np.float32))


def test_all_missing_files_are_named_at_once(tmp_path):
    path = save(tmp_path, 1, {"a": (sample(4), (2,)), "b": (sample(4), (2,))})
    for file in ("a/c.0", "a/c.1", "b/c.1"):
        (path / "tensors/weight" / file).unlink()
    with pytest.raises(CheckpointError, match=r"a/c\.0 is missing.*a/c\.1 is missing"):
        load_all(path)
    with pytest.raises(CheckpointError, match=r"a/c\.0 is missing.*a/c\.1 is missing.*b/c\.1 is missing"):
        CheckpointReader(path).require_files()


def test_swapped_chunks(tmp_path):
    path = small_save(tmp_path)
    first, second = (path / CHUNK).read_bytes(), (path / OTHER).read_bytes()
    (path / CHUNK).write_bytes(second)
    (path / OTHER).write_bytes(first)
    with pytest.raises(CheckpointError, match=rf"weight of {NAME}: .*c\.0\.0 is whole but not the chunk"):
        load_all(path)


def test_a_chunk_and_a_manifest_of_another_step(tmp_path):
    one, two = small_save(tmp_path, 1, seed=1), small_save(tmp_path, 2, seed=2)
    shutil.copy(one / CHUNK, two / CHUNK)
    with pytest.raises(CheckpointError, match="not the chunk that was saved here: it is that of step 1, run run"):
        load_all(two)
    shutil.copy(one / "manifest.json", two / "manifest.json")
    with pytest.raises(CheckpointError, match="belongs to step 1"):
        load_all(two)


def test_every_byte_of_the_manifest_counts(tmp_path):
    path = small_save(tmp_path)
    manifest = path / "manifest.json"
    good = manifest.read_bytes()
    for position in range(len(good)):
        flip(manifest, 8 * position + position % 8)
        with pytest.raises(CheckpointError, match=r"manifest\.json: damaged"):
            CheckpointReader(path)
        manifest.write_bytes(good[:position])
        with pytest.raises(CheckpointError, match=r"manifest\.json: damaged"):
            CheckpointReader(path)
        manifest.write_bytes(good)


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        CheckpointReader(tmp_path / "step-00000001")
    with pytest.raises(CheckpointError, match="never committed"):
        CheckpointReader(tmp_path)


def array_field(name, value):
    def change(fields):
        fields["arrays"][0][name] = value

    return change


def field(name, value):
    return lambda fields: fields.update({name: value})


HOSTILE = {
    "newer": (field("version", 2), "version 2 is newer than 1"),
    "version_type": (field("version", "1"), "not a manifest"),
    "format": (field("format", "torch"), "format 'torch'"),
    "no_arrays": (lambda fields: fields.pop("arrays"), "not a manifest"),
    "entry_type": (field("arrays", [3]), "another type"),
    "no_chunks": (lambda fields: fields["arrays"][0].pop("chunks"), "incomplete"),
    "twice": (lambda fields: fields["arrays"].append(fields["arrays"][0]), "listed twice"),
    "parent": (array_field("name", "../../../outside"), "not allowed"),
    "dots": (array_field("kind", ".."), "not allowed"),
    "absolute": (array_field("name", "/etc/passwd"), "not allowed"),
    "backslash": (array_field("name", "..\\x"), "not allowed"),
    "nul": (array_field("name", "x\0"), "not allowed"),
    "newline": (array_field("name", "x\n"), "not allowed"),
    "long": (array_field("name", "x" * 10_000), "not allowed"),
    "chunk_path": (array_field("chunks", {"c.0.0": "0" * 8, "../c.1.0": "0" * 8}), "missing: c.1.0"),
    "chunk_extra": (lambda f: f["arrays"][0]["chunks"].update({"c.2.0": "0" * 8}), "3 chunks recorded"),
    "crc": (array_field("chunks", {"c.0.0": "xyz", "c.1.0": "0" * 8}), "8 hex digits"),
    "dtype": (array_field("dtype", "object"), "'object' is not stored"),
    "huge_grid": (array_field("shape", [2**62, 6]), "missing: c.2.0"),
    "huge_chunk": (lambda f: f["arrays"][0].update(shape=[2**40, 6], chunk_shape=[2**39, 6]), "instead of 131"),
    "negative": (array_field("shape", [-4, 6]), "do not cut"),
    "bool_dim": (array_field("chunk_shape", [2, True]), "do not cut"),
    "text_dim": (array_field("shape", ["4", 6]), "do not cut"),
    "many_dims": (lambda f: f["arrays"][0].update(shape=[1] * 99, chunk_shape=[1] * 99), "do not cut"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_manifest(tmp_path, case):
    change, message = HOSTILE[case]
    path = small_save(tmp_path)
    rewrite(path, change)
    with pytest.raises(CheckpointError, match=message):
        load_all(path)


def test_deep_json_and_pickle_are_refused(tmp_path):
    path = small_save(tmp_path)
    manifest = path / "manifest.json"
    for body in (b'{"state": ' + b"[" * 100_000, pickle.dumps(Payload(tmp_path / "executed"))):
        manifest.write_bytes(body + b',\n"crc32c": "%08x"\n}\n' % crc32c(body))
        with pytest.raises(CheckpointError, match="not a manifest"):
            CheckpointReader(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("linked", [CHUNK, f"tensors/weight/{NAME}", "tensors", "manifest.json"])
def test_links_are_not_followed(tmp_path, linked):
    path = small_save(tmp_path / "checkpoints")
    (path / linked).rename(tmp_path / "outside")
    (path / linked).symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match=r"a link leads elsewhere|c\.0\.0: a link"):
        load_all(path)


def test_a_link_to_the_whole_checkpoint_is_fine(tmp_path):
    path = small_save(tmp_path / "real")
    (tmp_path / "mine").symlink_to(path.parent)
    np.testing.assert_array_equal(load_all(tmp_path / "mine" / path.name)[0], sample(4, 6))
    small_save(tmp_path / "mine", 2)


@pytest.mark.timeout(10)
def test_a_pipe_does_not_block(tmp_path):
    path = small_save(tmp_path)
    (path / CHUNK).unlink()
    os.mkfifo(path / CHUNK)
    with pytest.raises(CheckpointError, match=r"c\.0\.0: a pipe, not a regular file"):
        load_all(path)
