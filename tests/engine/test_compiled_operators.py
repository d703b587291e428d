"""Locks of compilations: those of the living are left alone, those of the dead removed, those in doubt named."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatrain.config.load import load_config
from megatrain.engine.errors import OperatorLockError
from megatrain.engine.zero import compiled_operators
from megatrain.engine.zero.compiled_operators import announce_compilations, free_lock, free_locked_operators

# compiles like torch does: holds the baton, says so, and waits
BUILDER = """
import sys, time
from torch.utils.file_baton import FileBaton

baton = FileBaton(sys.argv[1])
assert baton.try_acquire()
print("compiling", flush=True)
sys.stdin.readline()
baton.release()
"""


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the operator cpu_adam, as torch places it."""
    from torch.utils.cpp_extension import _get_build_directory

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return Path(_get_build_directory("cpu_adam", False)) / "lock"


def start_compiling(lock: Path) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", BUILDER, str(lock)], stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None and process.stdout.readline() == "compiling\n"
    return process


def test_the_lock_of_the_living_stays_and_that_of_the_dead_goes(lock: Path, capsys: pytest.CaptureFixture) -> None:
    config = load_config([], ["--optimizer.name", "cpu_adamw", "--offload.optimizer", "cpu"], 1).config
    process = start_compiling(lock)
    try:
        free_locked_operators(config)
        assert lock.exists() and not capsys.readouterr().out
    finally:
        process.kill()
        process.communicate()
    assert lock.exists(), "this is what DeepSpeed would wait for"
    free_locked_operators(load_config([], [], 1).config)
    assert lock.exists(), "a run that compiles nothing does not look"
    free_locked_operators(config)
    assert not lock.exists() and f"removed {lock}" in capsys.readouterr().out


def test_where_other_hosts_may_compile_an_old_lock_is_named(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_operators, "_file_system", lambda path: "nfs4")
    lock.touch()
    os.utime(lock, (0, 0))
    with pytest.raises(OperatorLockError, match=r"cpu_adam/lock says .* 15 minutes, .* delete the file"):
        free_lock(lock)
    assert lock.exists(), "it may be another host's"


def test_a_compilation_is_announced_once(lock: Path) -> None:
    config = load_config([], ["--optimizer.name", "cpu_adamw", "--offload.optimizer", "cpu"], 1).config
    (lock.parent.parent / "pin_memory" / "pin_memory.so").parent.mkdir(exist_ok=True)
    (lock.parent.parent / "pin_memory" / "pin_memory.so").touch()
    said: list[str] = []
    announce_compilations(config, said.append)
    assert len(said) == 1 and said[0].startswith(f"compiling DeepSpeed's operator cpu_adam into {lock.parent}")
    (lock.parent / "cpu_adam.so").touch()
    announce_compilations(config, said.append)
    assert len(said) == 1
