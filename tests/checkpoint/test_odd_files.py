"""Folders, links, pipes, sockets, garbage, endless or closed files in every place of a checkpoint, for every tool.

Each gets an answer: exit code 0, 1 or 2 with a line that says ``error``, in moments; a save always gets its place.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from launch.checkpoint import main
from launch.generate import main as generate
from megatrain.checkpoint.resume import _candidates, _looked_at
from megatrain.checkpoint.store.arrays import CheckpointReader, CheckpointWriter
from megatrain.checkpoint.store.errors import CheckpointError
from megatrain.convert.formats import FORMATS, Choices, detect
from tests.checkpoint.odd import ODD, put, save_run

ARRAY = "tensors/weight/layers.0.attention.output.weight"
NEWEST, OLDER = "checkpoints/step-00000002", "checkpoints/step-00000001"
PLACES = {
    "step": NEWEST,
    "manifest": f"{NEWEST}/manifest.json",
    "tensors": f"{NEWEST}/tensors",
    "all_header": f"{NEWEST}/tensors/zarr.json",
    "kind": f"{NEWEST}/tensors/weight",
    "kind_header": f"{NEWEST}/tensors/weight/zarr.json",
    "array": f"{NEWEST}/{ARRAY}",
    "header": f"{NEWEST}/{ARRAY}/zarr.json",
    "chunk": f"{NEWEST}/{ARRAY}/c.0.0",
    "latest": "checkpoints/latest",
    "hint": "checkpoints/.latest.tmp",
    "owner": "checkpoints/owner.json",
    "partial": "checkpoints/.step-00000002.partial",
    "removed": "checkpoints/.step-00000001.removed",
    "replaced": "checkpoints/.step-00000003.replaced",
    "next": "checkpoints/step-00000003",
    "checkpoints": "checkpoints",
}


def resume(run: Path) -> int:
    """As a start does, until it reads tensors."""
    for path in _candidates(run / "checkpoints", "auto"):
        try:
            _looked_at(path)
            return 0
        except CheckpointError as error:
            print(f"skipped: {error}")
    return 1


def save(run: Path) -> int:
    writer = CheckpointWriter(run / "checkpoints", 2, "run-b")
    try:
        writer.prepare()
        writer.write("weight", "new", np.ones(3, np.float32), offset=(0,), full_shape=(3,))
        path = writer.commit(writer.records(), {}, {})
    finally:
        writer.close()
    assert CheckpointReader(path).run_id == "run-b"
    return 0


def opened_for_conversion(run: Path) -> int:
    source = run / NEWEST
    FORMATS[detect(source)].read(source, Choices())
    return 0


TOOLS: dict[str, Callable[[Path], int]] = {
    "ls": lambda run: main(["ls", str(run)]),
    "verify": lambda run: main(["verify", str(run / NEWEST), str(run)]),
    "show": lambda run: main(["show", str(run / NEWEST)]),
    "diff": lambda run: main(["diff", str(run / NEWEST), str(run / OLDER)]),
    "prune": lambda run: main(["prune", str(run), "--keep-last", "1"]),
    "merge": lambda run: main(["merge", str(run / OLDER), str(run / NEWEST), "--output", str(run / "merged")]),
    "rebuild": lambda run: main(["rebuild", str(run / NEWEST)]),
    "generate": lambda run: generate(["--run", str(run)]),
    "convert": opened_for_conversion,
    "resume": resume,
    "save": save,
}
CASES = list(product(PLACES, ODD, TOOLS))
# what had no answer, or blocked saves for ever
ONCE_WRONG = [
    *product(["step"], ["unreadable"], ["ls", "verify", "prune", "resume", "save"]),
    *product(["step", "partial", "replaced"], ["dangling", "empty"], ["save"]),
    ("owner", "pipe", "prune"),
    ("hint", "pipe", "save"),
    ("manifest", "sparse", "convert"),
    ("chunk", "sparse", "merge"),
]


@contextmanager
def without_privileges(folder: Path) -> Iterator[None]:
    """Permissions count in the body, whoever runs the tests."""
    if os.geteuid() != 0:
        yield
        return
    folder.chmod(0o777)
    for path in [*folder.rglob("*")]:
        os.chown(path, 65534, 65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def try_all(cases: list[tuple[str, str, str]], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_run(folder / "whole")
    wrong = []
    for number, (place, kind, tool) in enumerate(cases):
        with without_privileges(folder):
            run = folder / f"run-{number}"
            shutil.copytree(folder / "whole", run)
            put(kind, run / PLACES[place])
            begun = time.monotonic()
            try:
                code, said = TOOLS[tool](run), ""
            except CheckpointError as error:  # of what is no program of its own
                code, said = 2, f"error: {error}"
            except Exception as error:
                code, said = -1, repr(error)
            seconds = time.monotonic() - begun
        printed = capsys.readouterr()
        said += printed.err
        answered = code in (0, 1) or (code == 2 and "error: " in said and "Traceback" not in said)
        if not answered or seconds > 5 or (tool == "save" and code and place != "checkpoints"):
            wrong.append((place, kind, tool, code, said[-300:]))
        shutil.rmtree(run)
    assert wrong == []


@pytest.mark.timeout(120)
def test_odd_files_get_an_answer(memory_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # 37 and the numbers of places, kinds and tools have no factor in common
    try_all(ONCE_WRONG + CASES[::37], memory_path, capsys)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_odd_files_get_an_answer(memory_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try_all(CASES, memory_path, capsys)


@pytest.mark.parametrize("kind", ["folder", "dangling", "pipe", "socket"])
@pytest.mark.parametrize(("place", "label"), [("header", ARRAY.rpartition("/")[2]), ("kind_header", "group weight")])
def test_a_header_that_is_no_file_is_named_with_its_tensor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, place: str, label: str
) -> None:
    save_run(tmp_path)
    path = tmp_path / PLACES[place]
    put(kind, path)
    assert main(["verify", str(tmp_path)]) == 1
    text = capsys.readouterr().out.splitlines()[0]
    assert label in text
    assert str(path) in text
    assert ("a link leads elsewhere" if kind == "dangling" else f"a {kind.replace('dangling', '')}") in text
