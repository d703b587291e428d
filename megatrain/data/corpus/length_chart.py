"""The lengths of documents as a picture: how many there are, and how many tokens they hold, by length."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatrain.config.extras import missing
from megatrain.data.errors import DataError

_WIDTH, _PANEL, _MARGIN = 900, 260, 60
_BARS_PER_OCTAVE = 4
_COLORS = ("#3b6ea5", "#c8643c")


def bins_of(lengths: NDArray[np.integer]) -> NDArray[np.int64]:
    """Edges of bins that grow by the fourth root of 2 and cover ``lengths``; each holds at least one whole number."""
    octaves = np.log2(max(int(lengths.max()), 2)) + 1
    edges = np.unique(np.floor(2 ** (np.arange(octaves * _BARS_PER_OCTAVE + 1) / _BARS_PER_OCTAVE)).astype(np.int64))
    return edges[: int(np.searchsorted(edges, lengths.max(), side="right")) + 1]


def draw_lengths(lengths: NDArray[np.integer], path: Path) -> None:
    """Draws two histograms over the logarithm of the length: of documents, and of the tokens in them.

    Raises:
        DataError: the package pillow is not installed.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise DataError(missing("pillow", "drawing", error)) from error
    edges = bins_of(lengths)
    image = Image.new("RGB", (_WIDTH, 2 * (_PANEL + _MARGIN)), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(14)
    for number, (title, weights) in enumerate((("documents", None), ("tokens", lengths))):
        counts = np.histogram(lengths, edges, weights=weights)[0]
        top = number * (_PANEL + _MARGIN) + _MARGIN // 2
        draw.text((_MARGIN, top - 22), f"{title} by length (at most {int(counts.max()):,} a bar)", "black", font)
        _draw_panel(draw, font, top, edges, counts, _COLORS[number])
    image.save(path, "PNG")


def _draw_panel(
    draw: Any, font: Any, top: int, edges: NDArray[np.int64], counts: NDArray[np.integer], color: str
) -> None:
    bottom = top + _PANEL
    left, step = _MARGIN, (_WIDTH - 2 * _MARGIN) / len(counts)
    for number, count in enumerate(counts.tolist()):
        height = _PANEL * count / max(int(counts.max()), 1)
        if count:
            corners = (left + number * step, bottom - max(height, 1), left + (number + 1) * step - 1, bottom)
            draw.rectangle(corners, fill=color)
    draw.line((left, bottom, _WIDTH - _MARGIN, bottom), "black")
    every = max(1, len(edges) // 12)
    for number in range(0, len(edges), every):
        x = left + number * step
        draw.line((x, bottom, x, bottom + 4), "black")
        draw.text((x, bottom + 6), f"{edges[number]:,}", "black", font, anchor="ma")
