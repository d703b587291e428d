"""What every program does alike: one line for what a user can mend, exit codes, Ctrl-C, a closed pipe."""

import argparse
import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatrain.console import run_config_tool, run_tool
from megatrain.errors import ExpectedError

ROOT = Path(__file__).parents[1]
PROGRAMS = sorted(path for folder in ("launch", "data_tools") for path in (ROOT / folder).glob("*.py"))


class FullDiskError(ExpectedError):
    exit_code = 74


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ExpectedError("train.steps: too few"), 2, "error: train.steps: too few\n"),
        (FullDiskError("no room"), 74, "error: no room\n"),
        (FileNotFoundError(2, "No such file or directory", "a.txt"), 2, "error: [Errno 2] No such file or directory: "),
        (BrokenPipeError(32, "Broken pipe"), 2, "error: [Errno 32] Broken pipe\n"),  # of a child, not of the output
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (ModuleNotFoundError("none", name="pyarrow.parquet"), 2, "error: tool.py needs the package pyarrow (none): "),
        (ModuleNotFoundError("none", name="PIL"), 2, "error: tool.py needs the package pillow (none): "),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_an_error_is_one_line_and_a_code(
    error: BaseException, code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def body(*_: object) -> int:
        raise error

    assert run_tool(argparse.ArgumentParser("tool.py"), body, []) == code
    err = capsys.readouterr().err
    assert err.startswith(told) and err.count("\n") == 1
    assert run_config_tool(argparse.ArgumentParser("tool.py"), body, []) == code
    assert capsys.readouterr().err == err
    if code != 130:
        assert run_tool(argparse.ArgumentParser("tool.py"), body, ["--debug"]) == code
        shown = capsys.readouterr().err
        assert shown.startswith("Traceback") and shown.endswith(err)


def test_what_nobody_expects_keeps_its_traceback() -> None:
    def body(_: argparse.Namespace) -> int:
        raise ModuleNotFoundError("none", name="torch")

    with pytest.raises(ModuleNotFoundError):
        run_tool(argparse.ArgumentParser(), body, [])


def test_the_body_s_code_and_overrides_arrive() -> None:
    seen: list[object] = []
    parser = argparse.ArgumentParser()
    parser.add_argument("--all", action="store_true")

    def body(options: argparse.Namespace, overrides: list[str]) -> int:
        seen.append((options.all, overrides))
        return 3

    assert run_config_tool(parser, body, ["--all", "--train.steps", "5"]) == 3
    assert seen == [(True, ["--train.steps", "5"])]


def test_a_reader_that_goes_away_ends_a_program_quietly() -> None:
    program = "import argparse, sys; from megatrain.console import run_tool; body = lambda _: print('x' * 100000)"
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", f"{program}; sys.exit(run_tool(argparse.ArgumentParser(), body, []))"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, cwd=ROOT, text=True, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_every_program_goes_through_it(path: Path) -> None:
    """Its ``main`` returns what ``run_tool`` or ``run_config_tool`` does."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    called = {
        node.value.func.id
        for node in ast.walk(main)
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name)
    }
    assert called & {"run_tool", "run_config_tool"}
