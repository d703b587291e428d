"""The pool of workers, shared by the whole run, and folders to write checkpoints into."""

import functools
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.operators import compile_operator
from tests.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Eight gloo workers, started when first used."""
    workers = Pool(8)
    yield workers
    workers.dismiss()


@pytest.fixture(scope="session")
def operator() -> Callable[[str], None]:
    """Compiles an operator of DeepSpeed's, by its builder's name, or skips the test where that can't be done."""

    @functools.cache
    def lacking(builder: str) -> str | None:
        worker = Pool(1, timeout=900)
        try:
            return worker.run(compile_operator, 1, builder)[0]
        finally:
            worker.close()

    def ready(builder: str) -> None:
        if missing := lacking(builder):
            pytest.skip(f"DeepSpeed cannot compile with its {builder}: no {missing}")

    return ready


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """Like ``tmp_path``, in memory where the system offers it: what is tested there is not the disk."""
    if not Path("/dev/shm").is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="megatrain-test-") as folder:
        yield Path(folder)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, where this process may mount one."""
    place = tmp_path / "small-disk"
    place.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True)
    if mount.returncode:
        pytest.skip("may not mount a file system")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)
