"""The tables of docs/compatibility.md. `python -m megatrain.config.pages.reference` renews them; a test compares."""

from itertools import combinations
from pathlib import Path

from megatrain.config.pages.table import between_marks, markdown_table
from megatrain.config.rules.combine import refusal_of, shown, values_left
from megatrain.config.rules.compatibility import REFUSALS, SETTINGS, Refusal

PAGE = Path("docs/compatibility.md")


def with_tables(page: str) -> str:
    """``page`` with what is between its two marks made again."""
    parts = [
        f"## Features\n\n{_features()}",
        f"## What is refused\n\n{_refused()}",
        f"## What follows from it\n\nNo value of the third feature goes with both.\n\n{_refused_by_others()}",
    ]
    return between_marks(page, "\n".join(parts))


def _features() -> str:
    numbers: dict[str, list[int]] = {name: [] for name in SETTINGS}
    for number, refusal in enumerate(REFUSALS, 1):
        numbers[refusal.setting.name].append(number)
        numbers[refusal.other.name].append(number)
    rows = [
        (
            f"`{setting.name}`",
            f"`{setting.key}`",
            ", ".join(setting.values),
            _listed(setting.used_with) if setting.used_with else "",
            ", ".join(map(str, numbers[setting.name])),
        )
        for setting in SETTINGS.values()
    ]
    return markdown_table(("feature", "key", "values", "counts only with", "refusals"), rows)


def _refused() -> str:
    rows = [(str(number), *map(_listed, _sides(refusal)), refusal.reason) for number, refusal in enumerate(REFUSALS, 1)]
    return markdown_table(("", "feature", "with", "why not"), rows)


def _sides(refusal: Refusal) -> tuple[tuple[str, tuple[str, ...]], tuple[str, tuple[str, ...]]]:
    return (refusal.setting.name, refusal.values), (refusal.other.name, refusal.other_values)


def _listed(side: tuple[str, tuple[str, ...]]) -> str:
    name, values = side
    return ", ".join([shown(name, values[0]), *(value.lstrip(">") for value in values[1:])])


def _refused_by_others() -> str:
    features = [(setting.name, value) for setting in SETTINGS.values() for value in setting.values]
    found: dict[tuple[str, str, tuple[str, str]], list[str]] = {}
    for one, two in combinations(features, 2):
        if one[0] != two[0] and not refusal_of(one, two) and (lacking := values_left(dict((one, two))).lacking):
            found.setdefault((lacking, one[0], two), []).append(one[1])
    rows = [
        (_listed((name, tuple(values))), shown(*two), f"`{lacking}`") for (lacking, name, two), values in found.items()
    ]
    return markdown_table(("feature", "with", "leave no value to"), rows)
