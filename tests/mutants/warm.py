"""Runs tests against a mutant in a fork of this process, which has the libraries and nothing of the package.

What costs seconds, the import of torch, DeepSpeed and megatron-core, is done once; a fork imports the package, with the
mutated text in place of one file, and calls pytest. The tests' own workers are forked from that one in turn.
"""

import contextlib
import gc
import importlib.abc
import importlib.machinery
import importlib.util
import os
import select
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from tests.mutants.mutant import ROOT, Mutant

LIBRARIES = (
    "numpy",
    "torch",
    "pytest",
    "_pytest.assertion.rewrite",
    "hypothesis",
    "deepspeed",
    "deepspeed.moe.layer",
    "deepspeed.ops.adam",
    "deepspeed.runtime.zero.parameter_offload",
    "torch._dynamo",
    "torch.distributed.pipelining.schedules",
    "torch.distributed.pipelining._schedule_visualizer",
    "torch.utils.flop_counter",
    "torch.nn.attention.flex_attention",
    "torch.nn.attention.varlen",
    "megatron.core.tensor_parallel.layers",
    "awscrt.checksums",
    "transformers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "pydantic",
)


@dataclass(frozen=True)
class Verdict:
    """``seen``: whether a test failed; ``by``: the first that did, or what ended the run; ``seconds``: of CPU."""

    seen: bool
    by: str
    seconds: float


def import_libraries() -> None:
    """What a fork need not import again. One thread: a fork has no others."""
    gc.disable()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    for name in LIBRARIES:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    assert not any(name.partition(".")[0] == "megatrain" for name in sys.modules), "a fork imports the package itself"
    gc.freeze()
    gc.enable()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the mutated module, with its mistake."""

    def __init__(self, mutant: Mutant):
        self._mutant, self._source = mutant, mutant.source()

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> Any:
        if fullname != self._mutant.module:
            return None
        return importlib.util.spec_from_file_location(
            fullname, self._mutant.path, loader=_Loader(fullname, str(self._mutant.path), self._source)
        )


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, fullname: str, path: str, source: str):
        super().__init__(fullname, path)
        self._source = source

    def get_code(self, fullname: str) -> Any:
        return compile(self._source, self.path, "exec", dont_inherit=True)


def judge(mutant: Mutant | None, tests: list[str], timeout: float) -> Verdict:
    """Runs ``tests`` (pytest's names, in this order, until one fails) against a mutant; None: against what is there.

    ``timeout``: seconds of time for all; a mutant that hangs is seen.
    """
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(told)
        _run_and_exit(mutant, tests, tell)
    os.close(tell)
    try:
        said = _read(told, time.monotonic() + timeout)
    finally:
        os.close(told)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # its workers with it
        used = os.wait4(child, 0)[2]
    seconds = used.ru_utime + used.ru_stime
    if said is None:
        return Verdict(True, f"no end within {timeout:g} s", seconds)
    if not said:
        return Verdict(True, "the process ended", seconds)
    verdict, _, by = said.partition(" ")
    return Verdict(verdict == "seen", by, seconds)


def _read(pipe: int, end: float) -> str | None:
    parts: list[bytes] = []
    while (left := end - time.monotonic()) > 0:
        if select.select([pipe], [], [], left)[0]:
            part = os.read(pipe, 1 << 16)
            if not part:
                return b"".join(parts).decode()
            parts.append(part)
    return None


def _run_and_exit(mutant: Mutant | None, tests: list[str], tell: int) -> None:
    """In the fork: never returns."""
    os.setsid()
    try:
        log = os.open(os.environ.get("MUTANT_LOG", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        said = _tested(mutant, tests)
    except BaseException as error:
        traceback.print_exc()
        said = f"seen {type(error).__name__} while importing"
    os.write(tell, said.encode()[: 1 << 12])
    os._exit(0)  # the workers are killed by whoever waits


def _tested(mutant: Mutant | None, tests: list[str]) -> str:
    import pytest

    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    if mutant is not None:
        sys.meta_path.insert(0, _Finder(mutant))
    _fork_workers_from_here()
    first = _FirstFailure()
    code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-m", "", "--timeout", "0", *tests], plugins=[first])
    if code == pytest.ExitCode.OK:
        return "survived "
    return f"seen {first.name or pytest.ExitCode(code).name}"


class _FirstFailure:
    name = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid


def _fork_workers_from_here() -> None:
    """The workers of tests/pool.py: forked from this process instead of one that imports all anew."""
    import multiprocessing

    import megatrain.parity.preload  # noqa: F401 - the mistake, if it ends the import, is seen here
    import tests.pool

    fork = multiprocessing.get_context("fork")
    fork.set_forkserver_preload = lambda modules: None  # type: ignore[attr-defined]
    tests.pool.mp = type("Forks", (), {"get_context": staticmethod(lambda method: fork)})  # type: ignore[assignment]
