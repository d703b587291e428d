"""What is said of a package that is not installed."""

import ast
from pathlib import Path

from megatrain.config.extras import EXTRA_OF, missing

SETUP = Path(__file__).parents[2] / "setup.py"


def test_each_package_is_in_its_extra():
    (call,) = (node for node in ast.walk(ast.parse(SETUP.read_text())) if getattr(node, "arg", "") == "extras_require")
    extras = ast.literal_eval(call.value)
    for package, extra in EXTRA_OF.items():
        assert any(wanted.startswith(f"{package}>=") for wanted in extras[extra]), package


def test_the_cure_is_a_command_that_works_without_an_index_of_megatrain():
    told = missing("pyarrow", "reading a.parquet", ImportError("No module named 'pyarrow'"))
    assert told == (
        "reading a.parquet needs the package pyarrow (No module named 'pyarrow'): pip install pyarrow, or, in "
        'megatrain\'s checkout, pip install -e ".[data]"'
    )
    root = SETUP.parent
    texts = [path for kind in ("*.py", "*.md") for path in root.rglob(kind) if ".venv" not in path.parts]
    name = "megatrain["  # an index would have to know it
    assert not [
        path for path in texts if f"pip install {name}" in path.read_text() or f'install "{name}' in path.read_text()
    ]
