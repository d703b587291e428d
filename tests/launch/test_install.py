"""launch/install.sh: which Python it takes, and what it says of one that it can't take."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# answers as an interpreter of another version, and makes no environments
FAKE = """#!/bin/bash
case "$1" in
-c) exec {real} -c "import sys; sys.version_info = ({version}, 0); $2" ;;
--version) echo "Python {version}" ;;
*) exit 1 ;;
esac
"""


def interpreter(folder: Path, name: str, version: tuple[int, int]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(FAKE.format(real=sys.executable, version=", ".join(map(str, version))))
    path.chmod(0o755)
    return path


def install(path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The script with ``path`` first, and behind it the system's tools without any Python."""
    tools = path.parent / "tools"
    if not tools.exists():
        tools.mkdir()
        for tool in ("bash", "dirname", "cat", "rm", "grep"):
            found = next(
                Path(folder) / tool for folder in os.environ["PATH"].split(":") if (Path(folder) / tool).exists()
            )
            (tools / tool).symlink_to(found)
    made = {"PATH": f"{path}:{tools}", "MEGATRAIN_VENV": str(path.parent / "venv"), **environment}
    return subprocess.run(
        ["bash", str(ROOT / "launch" / "install.sh")], env=made, capture_output=True, text=True, timeout=60
    )


def test_the_python_that_is_named_is_taken_or_refused_by_name(tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    interpreter(programs, "python3", (3, 11))
    interpreter(programs, "python3.13", (3, 13))
    interpreter(programs, "python3.14", (3, 14))
    taken = install(programs, PYTHON="python3.13")
    assert "python3.13 cannot make virtual environments" in taken.stderr
    newer = install(programs, PYTHON="python3.14")
    assert newer.returncode == 2 and "PYTHON=python3.14 can't be taken: Python 3.14" in newer.stderr
    missing = install(programs, PYTHON="python3.12")
    assert missing.returncode == 2 and "PYTHON=python3.12 can't be taken: no such program" in missing.stderr


def test_without_a_name_the_first_that_fits_is_taken(tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    interpreter(programs, "python3", (3, 14))
    alone = install(programs)
    assert alone.returncode == 2 and "python3 is Python 3.14" in alone.stderr and "PYTHON=/path" in alone.stderr
    interpreter(programs, "python3.13", (3, 13))
    assert "python3.13 cannot make virtual environments" in install(programs).stderr


def test_an_environment_of_another_python_is_not_installed_into(tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    interpreter(programs, "python3", (3, 13))
    interpreter(tmp_path / "venv" / "bin", "python", (3, 11))
    refused = install(programs)
    assert refused.returncode == 2 and "environment of Python 3.11, and python3 is 3.13" in refused.stderr


def test_the_script_allows_what_the_package_does() -> None:
    low, high = re.search(r'python_requires=">=3\.(\d+),<3\.(\d+)"', (ROOT / "setup.py").read_text()).groups()  # type: ignore[union-attr]
    in_script = re.search(r"^ +(3\.[\d. |]+)\)$", (ROOT / "launch" / "install.sh").read_text(), re.MULTILINE)
    assert in_script is not None
    assert in_script[1].split(" | ") == [f"3.{minor}" for minor in range(int(low), int(high))]
