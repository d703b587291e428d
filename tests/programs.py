"""Programs of the project in processes that start at once: forked from the one that imported everything."""

import atexit
import functools
import multiprocessing as mp
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.warm_python import make_clients, serve

LAUNCHER = ("CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets; a program that nobody launched has none of it."""


@functools.cache
def warm_programs() -> Path:
    """A folder with a ``python`` that starts at once, and a ``deepspeed`` that begins with it."""
    folder = Path(tempfile.mkdtemp(prefix="megatrain-programs-"))
    (folder / "bin").mkdir()
    address = str(folder / "server")
    make_clients(folder / "bin", address)
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["megatrain.parity.preload"])
    server = context.Process(target=serve, args=(address,))
    server.start()
    atexit.register(_end, server, folder)
    while not Path(address).exists():
        assert server.is_alive()
        time.sleep(0.01)
    return folder / "bin"


def _end(server: mp.process.BaseProcess, folder: Path) -> None:
    server.kill()
    server.join()
    shutil.rmtree(folder)


def unlaunched(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment with ``environment``, and nothing that a launcher sets besides."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCHER} | dict(environment or {})


def run_program(
    words: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None, timeout: float = 280.0
) -> subprocess.CompletedProcess[str]:
    """Runs ``words``, a script and its arguments, in ``folder``. As a new interpreter would, but for the imports.

    Args:
        environment: added to this process's, from which a launcher's variables are taken.
        timeout: in seconds.

    Raises:
        subprocess.TimeoutExpired: it did not end in time, and was killed.
    """
    command = [str(warm_programs() / "python"), *words]
    return subprocess.run(
        command, cwd=folder, env=unlaunched(environment), capture_output=True, text=True, timeout=timeout
    )
