"""Over a thousand seeded mutations of every file of a checkpoint: none loads silently."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatrain.checkpoint.store.arrays import CheckpointReader, CheckpointWriter
from megatrain.checkpoint.store.errors import CheckpointError
from tests.checkpoint.test_store import VERSIONS, sample, write_array

COUNT = 1200
ARRAYS = {"embedding.weight": ((12, 4), (6, 4)), "layers.0.up.weight": ((6, 8), (3, 4)), "norm.weight": ((5,), (5,))}
KINDS = ("weight", "exp_avg", "exp_avg_sq")


def save_model(folder: Path, step: int, run_id: str, seed: int) -> Path:
    writer = CheckpointWriter(folder, step, run_id)
    writer.prepare()
    for number, kind in enumerate(KINDS):
        for name, (shape, chunk_shape) in ARRAYS.items():
            write_array(writer, name, sample(*shape, seed=10 * seed + number), chunk_shape, kind)
    state = {"step": step, "tokens": 1000 * step, "data": {"seed": 1, "digest": "ab" * 32}, "seeds": [1, 2, 3]}
    return writer.commit(writer.records(), state, VERSIONS)


def load(path: Path) -> list[np.ndarray]:
    """As a run does: names and sizes first, then every part."""
    reader = CheckpointReader(path)
    reader.require_files()
    return [reader.read(*key) for key in reader.arrays]


def bit_flip(chosen: random.Random, data: bytes) -> bytes:
    bit = chosen.randrange(8 * len(data))
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def zeroed_range(chosen: random.Random, data: bytes) -> bytes:
    start = chosen.randrange(len(data))
    size = chosen.randint(1, len(data) - start)
    return data[:start] + bytes(size) + data[start + size :]


def truncation(chosen: random.Random, data: bytes) -> bytes:
    return data[: chosen.randrange(len(data))]


def extension(chosen: random.Random, data: bytes) -> bytes:
    return data + chosen.randbytes(chosen.randint(1, 64))


def repeated_range(chosen: random.Random, data: bytes) -> bytes:
    """As a block that was written to the wrong place."""
    size = chosen.randint(1, max(1, len(data) // 2))
    source, target = (chosen.randrange(len(data) - size + 1) for _ in range(2))
    return data[:target] + data[source : source + size] + data[target + size :]


def edited_manifest(chosen: random.Random, data: bytes) -> bytes:
    """Another value of some field, the file still being JSON."""
    fields = json.loads(data)
    key = chosen.choice([key for key in fields if key != "arrays"])
    array = chosen.choice(fields["arrays"])
    if chosen.random() < 0.5:
        fields[key] = chosen.choice([None, 0, "", {}, [], 2**70, fields[key]])
    else:
        array[chosen.choice(list(array))] = chosen.choice([None, [1], "float32", {"c": "00000000"}])
    return json.dumps(fields).encode()


IN_PLACE = [bit_flip, zeroed_range, truncation, extension, repeated_range]


def mutate(chosen: random.Random, path: Path, others: list[Path]) -> str:
    """Damages one file of the checkpoint; what it did, or "" where the bytes are still the same."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    file = chosen.choice(files)
    before = file.read_bytes()
    kind = chosen.choice([*IN_PLACE, "deletion", "empty", "foreign", "swap", "edited"])
    if kind == "edited":
        file = path / "manifest.json"
        before = file.read_bytes()
        file.write_bytes(edited_manifest(chosen, before))
    elif kind == "deletion":
        file.unlink()
        return f"{kind} of {file.name}"
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "foreign":  # of another step, of another run
        shutil.copy(chosen.choice(others) / file.relative_to(path), file)
    elif kind == "swap":
        other = chosen.choice([one for one in files if one != file])
        file.write_bytes(other.read_bytes())
        if before != file.read_bytes():
            other.write_bytes(before)
    else:
        file.write_bytes(kind(chosen, before))
        kind = kind.__name__
    return f"{kind} of {file.name}" if file.read_bytes() != before else ""


def test_no_mutation_loads_silently(memory_path: Path) -> None:
    good = save_model(memory_path / "run", 7, "run-a", 1)
    others = [save_model(memory_path / "run", 6, "run-a", 2), save_model(memory_path / "other", 7, "run-b", 3)]
    wanted = [array.tobytes() for array in load(good)]
    place = memory_path / "mutated" / good.name
    chosen, seen = random.Random(20261125), Counter[str]()
    while seen.total() < COUNT:
        shutil.copytree(good, place)
        told = mutate(chosen, place, others)
        if told:
            with pytest.raises(CheckpointError) as error:
                load(place)
                pytest.fail(f"{told} loaded silently")
            assert place.name in str(error.value) or "manifest.json" in str(error.value), "it says where"
            seen[told] += 1
        else:
            assert [array.tobytes() for array in load(place)] == wanted
        shutil.rmtree(place)
    kinds = {told.split(" of ")[0] for told in seen}
    assert len(kinds) == len(IN_PLACE) + 5
    assert {told.split(" of ")[1] for told in seen} >= {"manifest.json", "zarr.json", "c.0.0", "c.1.1", "c.0"}
