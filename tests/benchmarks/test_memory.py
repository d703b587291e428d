"""What a block keeps for its backward pass is what the formulas of benchmarks/memory.py say."""

import pytest

from benchmarks.memory import activation_bytes, activation_formula, budget_formula
from benchmarks.wire import layout_config

MODEL = layout_config({}, 1).model


@pytest.mark.parametrize("mode", ["none", "budget 0.5", "budget 1.0"])
def test_a_mode_keeps_what_its_formula_says(mode: str) -> None:
    assert activation_bytes(MODEL, mode) == activation_formula(MODEL, mode)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.8, 1.0])
def test_a_budget_allows_more_than_it_keeps(share: float) -> None:
    kept, most = budget_formula(MODEL, share)
    assert kept <= most
    assert (kept == most) or 0.0 < share < 1.0
