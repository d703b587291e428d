"""Every command that the pages print: its names exist, and it runs, in a folder that looks like a checkout."""

import functools
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from megatrain.config.schema import RunConfig
from tests.programs import run_program, unlaunched, warm_programs

ROOT = Path(__file__).parents[1]
PAGES = [path for path in [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))] if path.name != "CHANGELOG.md"]
BASH_BLOCK = re.compile(r"^```(?:bash|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)
README_COMMAND = re.compile(r"^    (bash .+)$", re.MULTILINE)
OWN_FILE = re.compile(r"^(?:launch|data_tools|configs|tests|docs|benchmarks|examples|\.ci)/")
INTERPRETERS = {"bash", "source", "python", "python3", "deepspeed", "torchrun"}
OPTION = re.compile(r"^--[A-Za-z][\w.-]*")

# what a page prints and no test can run, with the reason; the names in it are checked all the same
NOT_RUN = {
    "bash launch/test.sh": "is what runs this",
    "pytest tests/": "is a part of what runs this",
    "python -m megatrain.config.pages.reference": "writes into the checkout; tests/config checks its output",
    "python -m tests.architecture_picture": "writes into the checkout; tests/test_architecture_page.py checks it",
    "bash launch/coverage.sh": "runs what launch/test.sh runs",
    "deepspeed --hostfile": "needs several hosts",
    "srun": "needs a Slurm cluster",
    "mpirun": "needs an MPI; tests/data/test_tokenize.py runs it where there is one",
    "scontrol": "needs a Slurm cluster",
    "export MASTER": "needs a Slurm cluster",
    "pkill": "would end runs that are not the test's",
}
TINY_RUN = """
model: {num_layers: 2, hidden_size: 32, attention: {num_heads: 4}, vocab_size: 4096, max_seq_len: 32}
data: {train: data/quickstart/train, seq_len: 32}
precision: {dtype: fp32}
train: {global_batch_size: 8, log_every: 1}
"""


def commands(text: str) -> Iterator[str]:
    """Each command in the page's bash blocks."""
    for block in BASH_BLOCK.findall(text):
        yield from (line for line in block.replace("\\\n", " ").splitlines() if words_of(line))


def words_of(command: str) -> list[str]:
    """The words of a command; of ``bash -c '…'`` the words inside."""
    words = shlex.split(command, comments=True)
    return shlex.split(words[words.index("-c") + 1]) if "-c" in words else words


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
    run = run_program([script, "--help"], ROOT)
    assert run.returncode == 0, run.stderr
    return run.stdout


def reason_not_to_run(command: str) -> str | None:
    return next((reason for start, reason in NOT_RUN.items() if command.startswith(start)), None)


class Workspace:
    """A folder with links to the project's and what the pages take for given: ``run.yaml`` and ``texts/``.

    Programs read and write ``data/`` and ``runs/`` here.
    """

    def __init__(self, folder: Path):
        self.folder, self.steps, self.printed = folder, 0, ""
        self.environment = warm_programs().parent
        for stamp in Path(sys.prefix).glob("megatrain-install.*"):  # launch/install.sh finds all installed
            shutil.copy(stamp, self.environment)
        for name in ("launch", "data_tools", "configs", "benchmarks", "examples", "tests", "megatrain"):
            if (ROOT / name).exists():
                (folder / name).symlink_to(ROOT / name)
        (folder / "run.yaml").write_text(TINY_RUN)
        (folder / "texts").mkdir()
        for number in range(100):
            (folder / "texts" / f"{number}.txt").write_text(f"This is text number {number}. It is short, like all.\n")

    def run(self, command: str) -> str:
        """Runs a page's command; training goes on for one more step only. Returns what it printed."""
        if "launch/pretrain.py" in command or "launch/quickstart.sh" in command:
            self.steps += 2
            command += f" --train.steps {self.steps} --train.eval_batches 1 --schedule.warmup_steps 1"
        path = f"{self.environment / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=unlaunched({"PATH": path, "MEGATRAIN_VENV": str(self.environment)}),
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout


def readme_commands() -> list[str]:
    return README_COMMAND.findall((ROOT / "README.md").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """After the README's first command, from which the other pages go on."""
    made = Workspace(tmp_path_factory.mktemp("checkout"))
    made.printed = made.run(readme_commands()[0])
    return made


def test_readme_opens_with_two_commands_and_the_first_works(workspace: Workspace) -> None:
    first, second = readme_commands()
    assert second == "bash launch/test.sh"
    assert "perplexity" in workspace.printed
    assert "def main(" in workspace.printed
    for label in ("run folder:", "TensorBoard:", "resume:"):
        assert label in workspace.printed
    again = workspace.run(f"{first} --print-config")  # trains nothing
    assert "already there with this content" in again, "a second time it reuses what is there"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_run(workspace: Workspace, page: Path) -> None:
    for command in commands(page.read_text(encoding="utf-8")):
        if reason_not_to_run(command):
            continue
        if command.startswith("tensorboard"):
            assert serves(command, workspace.folder), command
        else:
            workspace.run(command)


def serves(command: str, folder: Path) -> bool:
    """Whether the server says within a minute where it listens."""
    program = Path(sys.executable).with_name("tensorboard")
    words = [str(program), *words_of(command)[1:], "--port", "0", "--load_fast", "false"]
    server = subprocess.Popen(words, cwd=folder, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        end = time.monotonic() + 60
        return any("http://" in line for line in iter(server.stderr.readline, "") if time.monotonic() < end)
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_what_exists(page: Path) -> None:
    problems = []
    for command in commands(page.read_text(encoding="utf-8")):
        words = words_of(command)
        wrong = missing_files(words)
        # a script that is not there cannot be asked for its options
        wrong = wrong or unknown_options(words)
        problems += [f"{name} in: {command}" for name in wrong]
    assert problems == []


def test_a_wrong_command_is_seen(tmp_path: Path) -> None:
    block = [
        "# note",
        "FOO=1 python launch/nowhere.py \\",
        "  --a 1  # why",
        "bash gone.sh",
        "srun bash -c 'python lost.py'",
    ]
    page = "\n".join(["```bash", *block, "```", ""])
    first, second, third = map(words_of, commands(page))
    assert first == ["FOO=1", "python", "launch/nowhere.py", "--a", "1"]
    assert missing_files(first) == ["launch/nowhere.py"]
    assert missing_files(second) == ["gone.sh"]
    assert missing_files(third) == ["lost.py"]
    assert is_config_key("--model.num_layers")
    assert not is_config_key("--model.num_layer")
    assert not is_config_key("--train.steps.more")
    with pytest.raises(AssertionError, match="gone"):
        Workspace(tmp_path).run("bash gone.sh")
