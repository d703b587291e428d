"""The house rules of docs/architecture.md, read off the syntax trees: who imports whom, how big things are."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 70

ALL = None  # every module of the room
# floors, from the ground up: a room imports rooms of lower floors only, and of these what stands here
FLOORS = (
    ("errors", "spec", "disk"),
    ("config", "cluster"),
    ("data", "optim", "parallel", "console"),
    ("models", "plan"),
    ("engine",),
    ("checkpoint",),
    ("convert", "record", "inference"),
    ("train",),
    ("parity",),
    ("launch", "data_tools", "benchmarks"),
)
# room -> rooms that it may import -> their modules that it may import
_BELOW = ("errors", "spec", "config")
CONTRACT: dict[str, dict[str, set[str] | None]] = {
    "errors": {},
    "spec": {},
    "disk": {},
    "config": dict.fromkeys(("spec", "errors"), ALL),
    "cluster": dict.fromkeys(("errors",), ALL),
    "console": {"errors": ALL, "config": {"extras", "reading"}},
    "data": dict.fromkeys((*_BELOW, "disk"), ALL),
    "optim": dict.fromkeys(_BELOW, ALL),
    "parallel": dict.fromkeys(_BELOW, ALL),
    "plan": {**dict.fromkeys(_BELOW, ALL), "parallel": {"topology", "schedules", "mesh", "marks"}},
    "models": {**dict.fromkeys(_BELOW, ALL), "parallel": {"layers", "marks"}},
    "engine": dict.fromkeys((*_BELOW, "cluster", "parallel", "optim"), ALL),
    "checkpoint": dict.fromkeys((*_BELOW, "disk", "parallel", "models", "engine"), ALL),
    "convert": dict.fromkeys((*_BELOW, "disk", "parallel", "models", "checkpoint"), ALL),
    "record": dict.fromkeys((*_BELOW, "disk", "data", "engine"), ALL),
    "inference": dict.fromkeys((*_BELOW, "data", "models", "checkpoint"), ALL),
    "train": dict.fromkeys(
        (*_BELOW, "cluster", "disk", "parallel", "models", "data", "optim", "engine", "checkpoint", "record"), ALL
    ),
    "parity": dict.fromkeys((*_BELOW, "parallel", "models", "data", "engine", "checkpoint", "train"), ALL),
    "launch": dict.fromkeys(
        (*_BELOW, "console", "cluster", "disk", "plan", "checkpoint", "convert", "inference", "train", "parity"), ALL
    ),
    "data_tools": dict.fromkeys((*_BELOW, "console", "data", "disk"), ALL),
    "benchmarks": dict.fromkeys((
        *_BELOW, "cluster", "parallel", "models", "data", "optim", "engine", "checkpoint", "convert", "plan", "record",
        "train", "parity",
    ), ALL),
}  # fmt: skip
# package -> the only rooms that may import it
SEAMS = {
    "deepspeed": {"engine", "benchmarks"},  # a benchmark measures them by themselves, too
    "megatron": {"parallel", "benchmarks"},
    "torch.distributed.pipelining": {"parallel", "benchmarks"},
    "torch": set(CONTRACT) - {"errors", "spec", "disk", "config", "cluster", "console", "data_tools"},
}
# a path below the home, root or data folder of somebody's machine
MACHINE_PATH = re.compile(r"(?<![\w.~$}])/(?:home|root|work|opt|mnt|scratch|Users)/\w")
TEXT_SUFFIXES = {".py", ".sh", ".md", ".yaml", ".yml", ".toml", ".txt", ".lock", ".json", ".cfg", ""}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return Path(parts[1]).stem if parts[0] == "megatrain" and len(parts) > 1 else parts[0]


def imported_names(source: str) -> Iterator[str]:
    """Every dotted name that ``source`` imports, wherever the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (f"{module}.{alias.name}" for alias in node.names)


def import_violations(room: str, source: str) -> list[str]:
    """What ``source``, a file of ``room``, imports against the contract."""
    violations = []
    for name in imported_names(source):
        if name.startswith("."):
            violations.append(f"{name} is relative")
        for package, rooms in SEAMS.items():
            if room not in rooms and f"{name}.".startswith(f"{package}."):
                violations.append(name)
        first, *rest = name.split(".")
        if first == "megatrain" and not _may_import(room, rest):
            violations.append(name)
    return violations


def _may_import(room: str, target: list[str]) -> bool:
    if target == ["__version__"]:  # stands in the package itself
        return True
    if room not in CONTRACT or not target:
        return False
    if target[0] == room:
        return True
    if target[0] not in CONTRACT[room]:
        return False
    modules = CONTRACT[room][target[0]]
    return modules is ALL or (len(target) > 1 and target[1] in modules)


def long_functions(source: str) -> list[str]:
    return [
        f"{node.name} ({size} lines)"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (size := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    ]


def own_texts() -> list[Path]:
    """The project's own text files: no environments, caches, runs or data sets."""
    own = ("megatrain", "launch", "data_tools", "tests", "docs", "configs", "benchmarks", "examples", ".ci", ".github")
    below = [path for folder in own for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts]
    tops = [path for path in ROOT.iterdir() if path.name not in (".git", ".coverage")]  # a worktree's; numbers
    return sorted(path for path in [*tops, *below] if path.is_file() and path.suffix in TEXT_SUFFIXES)


@pytest.mark.parametrize(
    "path", sources("megatrain", "launch", "data_tools", "benchmarks"), ids=lambda p: str(p.relative_to(ROOT))
)
def test_imports_follow_the_contract(path: Path) -> None:
    assert import_violations(room_of(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "path",
    [p for p in sources("tests/reference") if not p.name.startswith(("test_", "conftest"))],
    ids=lambda p: p.name,
)
def test_the_reference_knows_nothing_of_what_it_judges(path: Path) -> None:
    """A formula that both sides take from one place is proved by neither. Runs are started by its tests alone."""
    own = [
        name
        for name in imported_names(path.read_text(encoding="utf-8"))
        if name.startswith((".", "megatrain", "tests"))
    ]
    assert [name for name in own if not name.startswith("tests.reference.")] == []


def test_every_room_is_in_the_contract() -> None:
    rooms = {path.name for path in (ROOT / "megatrain").iterdir() if (path / "__init__.py").exists()}
    assert rooms <= set(CONTRACT)
    assert sorted(CONTRACT) == sorted(room for floor in FLOORS for room in floor)


def test_imports_go_down() -> None:
    """No room knows one of its own floor or of a higher one, so there is no circle."""
    floor_of = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    assert [
        (room, other) for room, others in CONTRACT.items() for other in others if floor_of[other] >= floor_of[room]
    ] == []


def test_files_and_functions_stay_small() -> None:
    too_big = []
    for path in sources("megatrain", "launch", "data_tools", "benchmarks", "examples", "tests"):
        source = path.read_text(encoding="utf-8")
        name = path.relative_to(ROOT)
        if (lines := source.count("\n")) > MAX_FILE_LINES:
            too_big.append(f"{name} ({lines} lines)")
        too_big += [f"{name}: {function}" for function in long_functions(source)]
    assert too_big == []


def test_nothing_names_a_path_of_one_machine() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in own_texts()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("config", "import torch"),
        ("config", "def f():\n    from torch import nn"),
        ("train", "from deepspeed.utils import logger"),
        ("engine", "import megatron.core.parallel_state as state"),
        ("engine", "from torch.distributed import pipelining"),
        ("models", "from megatrain.parallel.mesh import Mesh"),
        ("models", "import megatrain.engine.engine"),
        ("models", "from megatrain import engine"),
        ("data", "from ..parallel import mesh"),
        ("data_tools", "from megatrain.train import loop"),
        ("parallel", "import megatrain"),
    ],
)
def test_a_forbidden_import_is_seen(room: str, source: str) -> None:
    assert import_violations(room, source)


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("parallel", "from torch.distributed.pipelining import PipelineStage"),
        ("engine", "import deepspeed, torch.distributed as dist"),
        ("models", "from megatrain.parallel.layers import Layers"),
        ("models", "from megatrain.models.parts.loss import sum_of_token_losses"),
        ("launch", "from megatrain.train.loop import train"),
    ],
)
def test_an_allowed_import_passes(room: str, source: str) -> None:
    assert import_violations(room, source) == []


def test_a_long_function_and_a_machine_path_are_seen() -> None:
    assert long_functions("def f():\n" + "    pass\n" * MAX_FUNCTION_LINES)
    assert MACHINE_PATH.search("python " + "/".join(["", "home", "me", "train.py"]))
    assert not MACHINE_PATH.search("see https://example.org/work/page")
