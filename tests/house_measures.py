"""How big the house's files and functions are, and what share of the lines each room has.

python -m tests.house_measures
"""

import ast
import statistics
from collections import Counter

from tests.test_architecture import ROOT, room_of, sources


def main() -> None:
    files: list[tuple[int, str]] = []
    functions: list[tuple[int, str]] = []
    rooms: Counter[str] = Counter()
    for path in sources("megatrain", "launch", "data_tools", "benchmarks"):
        source = path.read_text(encoding="utf-8")
        rooms[room_of(path)] += source.count("\n")
        if path.name != "__init__.py":
            files.append((source.count("\n"), str(path.relative_to(ROOT))))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions.append(((node.end_lineno or 0) - node.lineno + 1, node.name))
    for what, found in (("files", files), ("functions", functions)):
        sizes = [size for size, _ in found]
        print(f"{len(sizes)} {what}: median {statistics.median(sizes):g} lines, longest {max(found)}")
    total = rooms.total()
    print("\n".join(f"{room:12} {lines:6} lines {lines / total:6.1%}" for room, lines in rooms.most_common()))


if __name__ == "__main__":
    main()
