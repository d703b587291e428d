"""Generated parts of Markdown pages."""

from collections.abc import Sequence

_BEGIN, _END = "<!-- generated: begin -->\n", "<!-- generated: end -->\n"


def between_marks(page: str, text: str) -> str:
    """``page`` with ``text`` in place of what stands between its two marks."""
    before, _, rest = page.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}\n{text}\n{_END}{after}"


def markdown_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table with a line for each of ``rows``."""
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
