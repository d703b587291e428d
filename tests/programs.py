"""Programs of the project in processes that start at once: forked from the one that imported everything."""

import multiprocessing as mp
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess

LAUNCHER = ("CUDA_VISIBLE_DEVICES", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets; a program that nobody launched has none of it."""


def run_program(
    words: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None, timeout: float = 280.0
) -> CompletedProcess[str]:
    """Runs ``words``, a script and its arguments, in ``folder``. As a new interpreter would, but for the imports.

    Args:
        environment: added to this process's, from which a launcher's variables are taken.
        timeout: in seconds.

    Raises:
        TimeoutError: it did not end in time, and was killed.
    """
    inherited = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["megatrain.parity.preload"])
    with tempfile.TemporaryDirectory(prefix="megatrain-program-") as place:
        printed = [Path(place) / name for name in ("stdout", "stderr")]
        arguments = list(words), folder, {**inherited, **(environment or {})}, printed
        process = context.Process(target=_become, args=arguments)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(
                f"{words}: not ended after {timeout} s\n{printed[0].read_text()}{printed[1].read_text()}"
            )
        return CompletedProcess(words, process.exitcode, *(path.read_text() for path in printed))


def _become(words: list[str], folder: Path, environment: dict[str, str], printed: list[Path]) -> None:
    for descriptor, path in enumerate(printed, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = words
    sys.path[0] = str(Path(words[0]).parent.resolve())
    runpy.run_path(words[0], run_name="__main__")
