"""The files around the code: one version, one list of checks, and what others' programs read is as they read it."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import setuptools
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import megatrain

ROOT = Path(__file__).parents[1]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py tells setuptools."""
    told: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **options: told.update(options))
    monkeypatch.chdir(ROOT)
    exec(compile(text("setup.py"), "setup.py", "exec"), {"__file__": str(ROOT / "setup.py")})
    return told


def test_the_version_is_one(metadata: dict[str, Any]) -> None:
    newest = re.search(r"^## (\S+)", text("CHANGELOG.md"), re.MULTILINE)
    assert newest is not None
    citation = yaml.safe_load(text("CITATION.cff"))
    assert metadata["version"] == megatrain.__version__ == citation["version"] == newest.group(1)
    assert "__version__" not in text("setup.py") and megatrain.__version__ not in text("setup.py")


def test_types_are_packaged(metadata: dict[str, Any]) -> None:
    for package, files in metadata["package_data"].items():
        for name in files:
            assert (ROOT / package / name).is_file()
    assert metadata["package_data"]["megatrain"] == ["py.typed"]
    folders = {str(path.parent.relative_to(ROOT)) for path in (ROOT / "megatrain").rglob("__init__.py")}
    assert {package.replace(".", "/") for package in metadata["packages"]} == folders


def test_the_lock_holds_what_setup_asks_for(metadata: dict[str, Any]) -> None:
    lines = [line for line in text("requirements.lock").splitlines() if line and not line.startswith("#")]
    locked = dict(line.lower().replace("_", "-").split("==") for line in lines)
    asked = [*metadata["install_requires"], *(one for extra in metadata["extras_require"].values() for one in extra)]
    for requirement in map(Requirement, asked):
        assert locked[requirement.name.lower()] in requirement.specifier, requirement


def test_a_citation_has_what_its_format_asks_for() -> None:
    citation = yaml.safe_load(text("CITATION.cff"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert all(author["name"] for author in citation["authors"])


def test_the_public_host_runs_the_test_command_on_every_python(metadata: dict[str, Any]) -> None:
    workflow = yaml.safe_load(text(".github/workflows/ci.yml"))
    assert {"push", "pull_request"} == set(workflow[True])  # YAML 1.1 reads the key `on` so
    job = workflow["jobs"]["test"]
    command = re.findall(r"^    (bash .+)$", text("README.md"), re.MULTILINE)[1]
    assert [step["run"] for step in job["steps"] if "run" in step] == [command]
    allowed = [f"3.{minor}" for minor in range(30) if f"3.{minor}" in SpecifierSet(metadata["python_requires"])]
    assert job["strategy"]["matrix"]["python"] == allowed


def test_templates_say_what_they_are_for() -> None:
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md"))
    assert forms
    for form in forms:
        _, front, body = form.read_text(encoding="utf-8").split("---\n", 2)
        assert {"name", "about"} <= yaml.safe_load(front).keys() and body.strip(), form.name
    linked = re.findall(r"\]\((\.\./[\w.]+)\)", text(".github/pull_request_template.md"))
    assert linked and all((ROOT / ".github" / path).exists() for path in linked)


def test_hooks_are_checks_of_the_test_command() -> None:
    hooks = [hook for repo in yaml.safe_load(text(".pre-commit-config.yaml"))["repos"] for hook in repo["hooks"]]
    checks = [line.split()[:2] for line in text("launch/test.sh").splitlines()]
    for hook in hooks:
        words = [word for word in hook["entry"].split() if not word.startswith("-")]
        assert any(check[: len(words)] == words for check in checks), hook["entry"]


def test_a_misspelt_word_is_found(tmp_path: Path) -> None:
    assert "\ncodespell\n" in text("launch/test.sh")
    page = tmp_path / "page.md"
    for written, code in (("the norm of the modle", 0), ("the norm that was " + "rec" + "ieved", 65)):
        page.write_text(written)
        command = [sys.executable, "-m", "codespell_lib", "--toml", str(ROOT / "pyproject.toml"), str(page)]
        assert subprocess.run(command, capture_output=True, timeout=60).returncode == code, written


@pytest.mark.parametrize("name", ["Dockerfile", "apptainer.def"])
def test_an_image_holds_what_install_would(name: str, metadata: dict[str, Any]) -> None:
    """Nothing here builds one; what can be read is held."""
    recipe = text(name)
    base = re.search(r"^(?:FROM|From:) python:(3\.\d+)-slim$", recipe, re.MULTILINE)
    assert base is not None and base.group(1) in SpecifierSet(metadata["python_requires"])
    steps = ("g++", "^torch==", "-r requirements.lock", "--no-deps --no-build-isolation -e .")
    at = [recipe.index(step) for step in steps]
    assert at == sorted(at), "torch alone first, as in launch/install.sh"
    copied = re.findall(r"^    (\S+) /megatrain/$", recipe, re.MULTILINE)
    assert all((ROOT / path).exists() for path in copied)
    assert re.search(r'^(ENTRYPOINT \["deepspeed"\]|    exec deepspeed "\$@")$', recipe, re.MULTILINE)
    assert "launch/pretrain.py --config" in recipe
