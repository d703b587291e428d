"""Every command that the pages print names scripts, options and configuration keys that exist."""

import functools
import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from megatrain.config.schema import RunConfig

ROOT = Path(__file__).parents[1]
PAGES = [path for path in [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))] if path.name != "CHANGELOG.md"]
BASH_BLOCK = re.compile(r"^```(?:bash|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OWN_FILE = re.compile(r"^(?:launch|data_tools|configs|tests|docs|benchmarks|\.ci)/")
INTERPRETERS = {"bash", "source", "python", "python3", "deepspeed", "torchrun"}
OPTION = re.compile(r"^--[A-Za-z][\w.-]*")


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command in the page's bash blocks."""
    for block in BASH_BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "-c" in words:  # bash -c 'command'
                yield shlex.split(words[words.index("-c") + 1])
            elif words:
                yield words


def missing_files(words: list[str]) -> list[str]:
    """Files of the project that a command names and that are not there."""
    scripts = [
        word for before, word in itertools.pairwise(words) if before in INTERPRETERS and word.endswith((".py", ".sh"))
    ]
    own = [word for word in words if OWN_FILE.match(word)]
    return [word for word in dict.fromkeys(scripts + own) if not (ROOT / word).exists()]


def unknown_options(words: list[str]) -> list[str]:
    """Options after one of our Python scripts that it does not have."""
    at = next((i for i, word in enumerate(words) if OWN_FILE.match(word) and word.endswith(".py")), None)
    if at is None:
        return []
    options = [match.group(0) for word in words[at + 1 :] if (match := OPTION.match(word))]
    return [option for option in options if not is_config_key(option) and option not in help_text(words[at])]


def is_config_key(option: str) -> bool:
    """Whether ``--a.b`` is a dotted override of a field of the run's config."""
    section: type[BaseModel] | None = RunConfig
    for part in option.removeprefix("--").split("."):
        if section is None or part not in section.model_fields:
            return False
        kind = section.model_fields[part].annotation
        section = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None
    return True


@functools.cache
def help_text(script: str) -> str:
    run = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_what_exists(page: Path) -> None:
    problems = []
    for words in commands(page.read_text(encoding="utf-8")):
        wrong = missing_files(words)
        # a script that is not there cannot be asked for its options
        wrong = wrong or unknown_options(words)
        problems += [f"{name} in: {shlex.join(words)}" for name in wrong]
    assert problems == []


def test_a_wrong_command_is_seen() -> None:
    block = [
        "# note",
        "FOO=1 python launch/nowhere.py \\",
        "  --a 1  # why",
        "bash gone.sh",
        "srun bash -c 'python lost.py'",
    ]
    page = "\n".join(["```bash", *block, "```", ""])
    first, second, third = commands(page)
    assert first == ["FOO=1", "python", "launch/nowhere.py", "--a", "1"]
    assert missing_files(first) == ["launch/nowhere.py"]
    assert missing_files(second) == ["gone.sh"]
    assert missing_files(third) == ["lost.py"]
    assert is_config_key("--model.num_layers")
    assert not is_config_key("--model.num_layer")
    assert not is_config_key("--train.steps.more")
