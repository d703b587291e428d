"""Which checkpoints stay."""

from pathlib import Path

import pytest

from megatrain.checkpoint.store.folder import list_checkpoints
from megatrain.checkpoint.store.retention import Retention, prune
from tests.checkpoint.test_store import small_save


@pytest.mark.parametrize(
    ("rule", "gone"),
    [
        (Retention(), []),
        (Retention(keep_every=20), []),
        (Retention(keep_last=2), [10, 20, 30]),
        (Retention(keep_last=2, keep_every=20), [10, 30]),
        (Retention(keep_last=9), []),
        (Retention(keep_last=1, keep_every=50), [10, 20, 30, 40]),
    ],
)
def test_rules(rule: Retention, gone: list[int]) -> None:
    assert rule.surplus([50, 10, 30, 20, 40]) == gone


def test_prune_removes_by_step_and_does_not_count_the_damaged(tmp_path: Path) -> None:
    for step in (4, 3, 1, 2):
        small_save(tmp_path, step)
    assert [path.name for path in prune(tmp_path, Retention(keep_last=1), damaged=[4])] == [
        "step-00000001",
        "step-00000002",
    ]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]
