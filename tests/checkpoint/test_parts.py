"""Chunks that ranks read in parts: less is read, and no damage of any byte of them goes by on any rank."""

import os
from pathlib import Path
from typing import Any

from megatrain.checkpoint.store.errors import CheckpointError
from megatrain.checkpoint.store.files import crc32c
from megatrain.checkpoint.store.parts import ReadPart, digest, rows_of, unproved
from tests.checkpoint.test_resume import engine_of
from tests.layouts import Layout, train_steps
from tests.pool import Pool

DATA = os.urandom(100)
ROWS_OF_TENSOR_RANKS = (
    "layers.0.attention.query_key_value.weight"  # a chunk of which each tensor-parallel rank has half of the rows
)


def part(start: int, stop: int, data: bytes = DATA, wanted: bytes = DATA) -> ReadPart:
    return ReadPart(digest("c"), crc32c(wanted), len(DATA), start, stop - start, crc32c(data[start:stop]))


def proved(*parts: ReadPart) -> bool:
    return not unproved(parts[:1], [rows_of([one]) for one in parts])


def test_what_proves_a_chunk() -> None:
    flipped = bytes([*DATA[:70], DATA[70] ^ 4, *DATA[71:]])
    assert proved(part(40, 100), part(0, 40))
    assert proved(part(0, 40), part(40, 100), part(0, 40), part(40, 100)), "copies read the same"
    assert proved(part(0, 10), part(10, 60), part(60, 100))
    assert not proved(part(0, 40)), "nobody read the rest"
    assert not proved(part(0, 40), part(50, 100))
    assert not proved(part(0, 60), part(50, 100))
    assert not proved(part(0, 40), part(40, 100, flipped))
    assert not proved(part(0, 40), part(40, 100), part(40, 100, flipped)), "one of two copies was read wrong"
    assert not proved(part(0, 40), part(40, 100, wanted=flipped)), "a rank has another manifest"
    assert not proved(part(0, 40, flipped, flipped), part(40, 100, flipped))


def save_in(layout: Layout, folder: str) -> str:
    from megatrain.checkpoint.save import save_checkpoint

    engine = engine_of("llama", layout)
    try:
        train_steps(engine, 1, 1)
        return str(save_checkpoint(engine, Path(folder), 1, "test", {}))
    finally:
        engine.close()


def load_damaged(path: str, kind: str, name: str) -> dict[str, Any]:
    """What a rank of two that split tensors reads, and what it hears after each byte that is flipped."""
    import torch.distributed as dist

    from megatrain.checkpoint.load import load_checkpoint
    from megatrain.checkpoint.store import tree

    engine = engine_of("llama", Layout(tp=2, zero_stage=0))
    file = Path(path) / "tensors" / kind / name / "c.0.0"
    content = file.read_bytes()
    places = [0, 5, len(content) // 2 - 8, len(content) // 2 + 8, len(content) - 5, len(content) - 1]
    counts = {"rows": 0, "chunks": 0}
    original = tree.Tree.read_rows, tree.Tree.read_chunk

    def counting(what: str, read: Any) -> Any:
        def call(*args: Any) -> Any:
            counts[what] += args[2:3] == ("c.0.0",) and args[1].key == (kind, name)
            return read(*args)

        return call

    heard = []
    try:
        tree.Tree.read_rows = counting("rows", original[0])  # type: ignore[method-assign]
        tree.Tree.read_chunk = counting("chunks", original[1])  # type: ignore[method-assign]
        load_checkpoint(engine, Path(path), lambda data, step: None)
        once = dict(counts)
        for place in places:
            dist.barrier()
            if engine.mesh.rank == 0:
                file.write_bytes(bytes([*content[:place], content[place] ^ 16, *content[place + 1 :]]))
            dist.barrier()
            try:
                load_checkpoint(engine, Path(path), lambda data, step: None)
                heard.append("")
            except CheckpointError as error:
                heard.append(str(error))
        dist.barrier()
        if engine.mesh.rank == 0:
            file.write_bytes(content)
        dist.barrier()
        load_checkpoint(engine, Path(path), lambda data, step: None)
    finally:
        tree.Tree.read_rows, tree.Tree.read_chunk = original  # type: ignore[method-assign]
        engine.close()
    return {"once": once, "heard": heard}


def test_no_flipped_byte_goes_by(pool: Pool, memory_path: Path) -> None:
    path = pool.run(save_in, 2, Layout(dp=2, zero_stage=1), str(memory_path))[0]
    ranks = pool.run(load_damaged, 2, path, "exp_avg", ROWS_OF_TENSOR_RANKS)
    for rank in ranks:
        assert rank["once"] == {"rows": 1, "chunks": 0}, "each reads its half only"
        assert len(rank["heard"]) == 6
        for text in rank["heard"]:
            assert f"exp_avg of {ROWS_OF_TENSOR_RANKS}" in text and "is damaged" in text
