"""The picture of the rooms in docs/architecture.svg, drawn from the imports, so that it can't lie.

    python -m tests.architecture_picture

An arrow goes from a room to one that it imports; it is left out where a way over other rooms says the same. Rooms stand
on their floors. An arrow over several floors has a place of its own on each one that it passes, so it runs through no
room; those to the same room share it (after Sugiyama et al. 1981).
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from tests.test_architecture import FLOORS, ROOT, SEAMS, imported_names, room_of, sources

PICTURE = ROOT / "docs" / "architecture.svg"
FOLDERS = ("megatrain", "launch", "data_tools", "benchmarks")
DOORS = {"deepspeed": "DeepSpeed", "megatron": "megatron-core"}
BOX, HEIGHT, LANE, GAP, FLOOR, MARGIN = 124, 40, 16, 14, 76, 20  # pixels

Imports = dict[str, set[str]]
Floors = list[list[str]]
Links = list[tuple[str, str]]


def imports() -> tuple[Imports, Imports]:
    """The rooms that each room imports, and those of ``SEAMS`` that it does."""
    rooms, libraries = defaultdict(set), defaultdict(set)
    for path in sources(*FOLDERS):
        room = room_of(path)
        for name in imported_names(path.read_text(encoding="utf-8")):
            first, *rest = name.split(".")
            if first == "megatrain" and rest and rest[0] not in (room, "__version__"):
                rooms[room].add(rest[0])
            libraries[room] |= {library for library in SEAMS if f"{name}.".startswith(f"{library}.")}
    return rooms, libraries


def without_detours(rooms: Imports) -> Imports:
    """The arrows that no longer way tells."""

    def below(room: str) -> set[str]:
        return rooms.get(room, set()).union(*(below(other) for other in rooms.get(room, set())))

    return {
        room: {other for other in others if not any(other in below(between) for between in others)}
        for room, others in rooms.items()
    }


def with_lanes(arrows: Imports) -> tuple[Floors, Links]:
    """Rooms and the lanes of long arrows by floor, from the ground up; and what is joined to what, the upper first.

    A lane is named after the room that it leads to, and its floor: ``plan@5``.
    """
    floors = [list(rooms) for rooms in FLOORS]
    floor_of = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    links: dict[tuple[str, str], None] = {}
    for room, others in sorted(arrows.items()):
        for other in sorted(others):
            lanes = [f"{other}@{floor}" for floor in range(floor_of[room] - 1, floor_of[other], -1)]
            for lane in lanes:
                if lane not in floors[int(lane.split("@")[1])]:
                    floors[int(lane.split("@")[1])].append(lane)
            links |= dict.fromkeys(itertools.pairwise([room, *lanes, other]))
    return floors, list(links)


def untangled(floors: Floors, links: Links) -> Floors:
    """The order on the floors, of those that sweeps by the middle of each one's neighbours come to, with the fewest
    crossings."""
    best, fewest = floors, _crossings(floors, links)
    for sweep in range(24):
        floors = [list(floor) for floor in floors]
        numbers = range(1, len(floors)) if sweep % 2 else range(len(floors) - 2, -1, -1)
        for number in numbers:
            beside = floors[number - 1] if sweep % 2 else floors[number + 1]
            floors[number].sort(key=lambda name, beside=beside: _middle(name, beside, links))
        if (crossings := _crossings(floors, links)) < fewest:
            best, fewest = floors, crossings
    return best


def _middle(name: str, beside: list[str], links: Links) -> float:
    places = [beside.index(other) for link in links if name in link for other in link if other in beside]
    return sum(places) / len(places) if places else len(beside) / 2


def _crossings(floors: Floors, links: Links) -> int:
    place = {name: (number, x) for number, floor in enumerate(floors) for x, name in enumerate(floor)}
    ends = [(place[upper], place[lower]) for upper, lower in links]
    return sum(a[0] == b[0] and (a[1] - b[1]) * (c[1] - d[1]) < 0 for (a, c), (b, d) in itertools.combinations(ends, 2))


def placed(floors: Floors, links: Links) -> dict[str, float]:
    """The middle of each box and lane: as near to its neighbours as the others on its floor let it."""
    x = {name: 0.0 for floor in floors for name in floor}
    for _ in range(50):
        for floor in [*floors, *reversed(floors)]:
            near = [[x[end] for link in links if name in link for end in link if end != name] for name in floor]
            wanted = [sum(places) / len(places) if places else 0.0 for places in near]
            x |= zip(floor, _apart(wanted, floor), strict=True)
    left = min(x[name] - _width(name) / 2 for name in x)
    return {name: middle - left + MARGIN for name, middle in x.items()}


def _width(name: str) -> int:
    return LANE if "@" in name else BOX


def _apart(wanted: list[float], floor: list[str]) -> list[float]:
    """Middles in their order, at least a gap apart, nearest to ``wanted`` in the sum of squares (pool adjacent
    violators)."""
    steps = [(_width(a) + _width(b)) / 2 + GAP for a, b in itertools.pairwise(floor)]
    offsets = [0.0, *itertools.accumulate(steps)]
    pools: list[tuple[float, int]] = []  # mean and size of what moves as one
    for place, offset in zip(wanted, offsets, strict=True):
        pools.append((place - offset, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (a, m), (b, n) = pools[-2:]
            pools[-2:] = [((a * m + b * n) / (m + n), m + n)]
    means = [mean for mean, size in pools for _ in range(size)]
    return [mean + offset for mean, offset in zip(means, offsets, strict=True)]


def picture() -> str:
    """The SVG."""
    rooms, libraries = imports()
    floors, links = with_lanes(without_detours(rooms))
    floors = untangled(floors, links)
    x = placed(floors, links)
    top = {name: MARGIN + FLOOR * (len(floors) - 1 - number) for number, floor in enumerate(floors) for name in floor}
    width = round(max(x[name] + _width(name) / 2 for name in x)) + MARGIN
    height = FLOOR * (len(floors) - 1) + HEIGHT + 2 * MARGIN
    drawn = [_arrow(upper, lower, x, top) for upper, lower in links]
    drawn += [_lane(name, x, top) for name in x if "@" in name]
    drawn += [_box(name, libraries[name], x, top) for name in x if "@" not in name]
    return "\n".join([_head(width, height), *drawn, "</svg>", ""])


def _head(width: int, height: int) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" text-anchor="middle">\n'
        "<title>Rooms of megatrain and what they import</title>\n"
        '<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#667"/></marker></defs>\n'
        f'<rect width="{width}" height="{height}" fill="#fff"/>'
    )


def _arrow(upper: str, lower: str, x: dict[str, float], top: dict[str, int]) -> str:
    begin, end, half = top[upper] + HEIGHT, top[lower], (FLOOR - HEIGHT) // 2
    a, b = round(x[upper]), round(x[lower])
    head = "" if "@" in lower else ' marker-end="url(#head)"'
    curve = f"M{a} {begin}C{a} {begin + half} {b} {end - half} {b} {end}"
    return f'<path d="{curve}" fill="none" stroke="#667"{head}/>'


def _lane(name: str, x: dict[str, float], top: dict[str, int]) -> str:
    return f'<path d="M{round(x[name])} {top[name]}v{HEIGHT}" stroke="#667"/>'


def _box(name: str, libraries: Iterable[str], x: dict[str, float], top: dict[str, int]) -> str:
    """White: no torch; blue: torch; orange: a door to DeepSpeed or megatron-core."""
    door = [shown for library, shown in DOORS.items() if library in libraries]
    colour = "#ffe3c2" if door else "#dbe9ff" if "torch" in libraries else "#f6f6f6"
    left, middle, y = round(x[name] - BOX / 2), round(x[name]), top[name]
    text = f'<text x="{middle}" y="{y + (17 if door else 25)}" font-size="14">{name}</text>'
    if door:
        text += f'<text x="{middle}" y="{y + 32}" font-size="9">{", ".join(door)}</text>'
    return f'<rect x="{left}" y="{y}" width="{BOX}" height="{HEIGHT}" rx="5" fill="{colour}" stroke="#445"/>{text}'


def main(path: Path = PICTURE) -> None:
    path.write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
