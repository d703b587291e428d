"""`python -m megatrain`: says which programs there are; the package itself is none."""

import ast
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[1]


def main() -> int:
    """Prints the programs, each with the first line of its own description. Returns 2: nothing was started."""
    print("megatrain is started by its programs, from its folder; each tells about itself with --help:")
    for path in sorted(path for folder in ("launch", "data_tools") for path in (_ROOT / folder).glob("*.py")):
        about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if about and path.stem != "__init__":
            print(f"  python {path.relative_to(_ROOT)!s:32} {about.splitlines()[0]}")
    print("docs/operations.md says how to start on several ranks and hosts.")
    return 2


if __name__ == "__main__":
    sys.exit(main())
