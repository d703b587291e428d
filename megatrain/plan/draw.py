"""A pipeline's timeline as text and as a picture: rank by time."""

from pathlib import Path
from typing import Any

from megatrain.plan.pipeline import Span, Timeline

LEGEND = "F forward, I input gradient, W weight gradient, B both gradients, . idle; then the micro-batch"
_COLOURS = {"F": (90, 140, 220), "I": (60, 170, 150), "W": (120, 190, 90), "B": (235, 160, 70)}
_SECOND_STAGE = 0.7  # the later stages of a rank are drawn darker
_UNIT, _ROW, _LEFT, _TOP = 22, 26, 64, 40  # pixels
_MOST_PIXELS = 16_000


def as_text(timeline: Timeline) -> str:
    """One line a rank, one cell a unit of time. A later stage of a rank has lower-case letters."""
    rows = []
    width = 1 + len(str(timeline.num_micro_batches - 1))
    for rank, spans in enumerate(timeline.ranks):
        first = min(span.action.stage for span in spans)
        cells = ["." * width] * round(timeline.duration)
        for span in spans:
            letter = span.action.kind if span.action.stage == first else span.action.kind.lower()
            for at in range(round(span.start), round(span.end)):
                cells[at] = f"{letter}{span.action.micro_batch}".ljust(width)
        rows.append(f"rank {rank:<3} " + " ".join(cells).rstrip())
    return "\n".join([title(timeline), *rows, LEGEND])


def title(timeline: Timeline) -> str:
    """The schedule and its idle share, simulated and by formula."""
    idle = f"idle {100 * timeline.bubble:.2f} % (theory {100 * timeline.theory:.2f} %)"
    size = f"{len(timeline.ranks)} ranks, {timeline.num_micro_batches} micro-batches"
    return f"{timeline.schedule}: {size}, {timeline.duration:g} units of time; {idle}"


def as_png(timeline: Timeline, path: Path) -> None:
    """Writes the picture: a row for each rank, white where it is idle."""
    from PIL import Image, ImageDraw

    unit = min(_UNIT, max(1, (_MOST_PIXELS - _LEFT) // round(timeline.duration)))
    width, height = _LEFT + round(unit * timeline.duration) + 10, _TOP + _ROW * len(timeline.ranks) + 34
    image = Image.new("RGB", (max(width, 640), height), "white")
    draw = ImageDraw.Draw(image)
    draw.text((8, 12), title(timeline), fill="black")
    for rank, spans in enumerate(timeline.ranks):
        top = _TOP + _ROW * rank
        draw.text((8, top + 6), f"rank {rank}", fill="black")
        draw.rectangle((_LEFT, top, _LEFT + unit * timeline.duration, top + _ROW - 3), outline=(200, 200, 200))
        first = min(span.action.stage for span in spans)
        for span in spans:
            _box(draw, span, unit, top, darker=span.action.stage != first)
    _legend(draw, _TOP + _ROW * len(timeline.ranks) + 8)
    image.save(path, format="PNG")


def _box(draw: Any, span: Span, unit: int, top: int, darker: bool) -> None:
    share = _SECOND_STAGE if darker else 1.0
    colour = tuple(int(share * part) for part in _COLOURS[span.action.kind])
    left = _LEFT + unit * span.start
    draw.rectangle((left, top, _LEFT + unit * span.end - 1, top + _ROW - 3), fill=colour, outline="white")
    if unit >= 14:
        draw.text((left + 4, top + 6), str(span.action.micro_batch), fill="white")


def _legend(draw: Any, top: int) -> None:
    names = {"F": "forward", "I": "input gradient", "W": "weight gradient", "B": "both gradients"}
    left = _LEFT
    for kind, name in names.items():
        draw.rectangle((left, top, left + 12, top + 12), fill=_COLOURS[kind])
        draw.text((left + 18, top), name, fill="black")
        left += 140
    draw.text((left, top), "white: idle; darker: later stages", fill="black")
