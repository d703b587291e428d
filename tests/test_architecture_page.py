"""docs/architecture.md and docs/tour.md say what is there: the picture, the rooms, the path of one step."""

import ast
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import FrameType
from typing import Any

from tests.architecture_picture import PICTURE, imports, picture, with_lanes, without_detours
from tests.layouts import ONE_PROCESS, build_engine, global_batch, run_config
from tests.pool import Pool
from tests.test_architecture import CONTRACT, ROOT

MOST_FILES, MOST_HOPS = 7, 9
HOP = re.compile(r"^\| (\d+) \| `([\w/]+\.py)` \| `([\w.]+)` \|", re.MULTILINE)
SVG = "{http://www.w3.org/2000/svg}"


def test_the_picture_shows_the_imports_of_today() -> None:
    assert PICTURE.read_text(encoding="utf-8") == picture(), "run `python -m tests.architecture_picture`"


def test_the_picture_names_every_room_once() -> None:
    texts = ElementTree.fromstring(picture()).iter(f"{SVG}text")
    assert sorted(str(text.text) for text in texts if text.get("font-size") == "14") == sorted(CONTRACT)


def test_an_arrow_is_left_out_where_a_longer_way_says_it() -> None:
    assert without_detours({"a": {"b", "c", "d"}, "b": {"c"}, "d": set()}) == {"a": {"b", "d"}, "b": {"c"}, "d": set()}


def test_who_follows_the_arrows_comes_to_all_that_is_imported() -> None:
    rooms, _ = imports()
    _, links = with_lanes(without_detours(rooms))
    reached = {room: {room} for room in [*CONTRACT, *(end for link in links for end in link)]}
    for _ in CONTRACT:
        for upper, lower in links:
            reached[upper] |= reached[lower]
    for room, others in rooms.items():
        assert others <= reached[room], room


def test_the_page_has_a_row_for_every_room() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(?:megatrain/)?(\w+)/?` \|", page, re.MULTILINE)
    assert sorted(rows) == sorted(CONTRACT)


def hops() -> list[tuple[str, str]]:
    """File and function of each hop of the tour, in order."""
    found = HOP.findall((ROOT / "docs" / "tour.md").read_text(encoding="utf-8"))
    assert [int(number) for number, *_ in found] == list(range(1, len(found) + 1))
    return [(path, function) for _, path, function in found]


def functions(path: Path) -> set[str]:
    """Qualified names of a file's functions and methods."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    owners: list[tuple[str, Any]] = [("", tree)]
    owners += [(f"{node.name}.", node) for node in tree.body if isinstance(node, ast.ClassDef)]
    return {owner + node.name for owner, body in owners for node in body.body if isinstance(node, ast.FunctionDef)}


def test_the_tour_is_short_and_names_what_exists() -> None:
    assert len({path for path, _ in hops()}) <= MOST_FILES
    assert 5 <= len(hops()) <= MOST_HOPS
    for path, function in hops():
        assert function in functions(ROOT / path), f"{path} has no {function}"


def called_functions() -> list[tuple[str, str]]:
    """What a training step calls of our own, in the order of first calls."""
    engine = build_engine(run_config("llama", ONE_PROCESS, model={"num_layers": 1}))
    batch, calls = global_batch(1), {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and "/megatrain/" in frame.f_code.co_filename:
            path = Path(frame.f_code.co_filename).relative_to(ROOT)
            calls[str(path), frame.f_code.co_qualname] = None

    sys.setprofile(note)
    try:
        engine.train_step(batch, 1)
    finally:
        sys.setprofile(None)
        engine.close()
    return list(calls)


def test_a_step_goes_the_way_of_the_tour(pool: Pool) -> None:
    """From the engine on: the loop and the loader come before the step."""
    calls = pool.run(called_functions, 1)[0]
    inside = [hop for hop in hops() if not hop[0].startswith(("megatrain/train/", "megatrain/data/"))]
    assert len(inside) >= MOST_HOPS - 2
    assert [call for call in calls if call in inside] == inside
