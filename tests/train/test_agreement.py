"""Flags that one rank raises and all see after the same step."""

import time
from pathlib import Path

import torch.distributed as dist

from tests.pool import Pool


def steps_with_flags(seen: Path) -> list[list[bool]]:
    """What the ranks agree on in four steps. Rank 1 raises its first flag in the second one, rank 0 its other one.

    Rank 1 begins the first step only when rank 0 is past its own beginning, which therefore waits for nobody.
    """
    from megatrain.train.agreement import Agreement

    rank, raised = dist.get_rank(), [False, False]
    agreement = Agreement(lambda: (raised[0], raised[1]))
    agreed = []
    for step in range(4):
        if step == 0 and rank == 1:
            end = time.monotonic() + 60
            while not seen.exists():
                assert time.monotonic() < end, "rank 0 waits for rank 1"
                time.sleep(0.01)
        agreement.begin()
        if step == 0 and rank == 0:
            seen.touch()
        raised[1 - rank] |= step == 1  # while the step is under way
        agreed.append(agreement.result())
        raised[1 - rank] &= step < 2
    return agreed


def test_what_one_rank_knows_all_see_after_the_same_step(pool: Pool, tmp_path: Path) -> None:
    first, second = pool.run(steps_with_flags, 2, tmp_path / "seen")
    assert first == second == [[False, False], [False, False], [True, True], [False, False]]


def test_one_rank_sees_its_own_flags_at_once(pool: Pool, tmp_path: Path) -> None:
    (agreed,) = pool.run(steps_with_flags, 1, tmp_path / "seen")
    assert agreed == [[False, False], [False, True], [False, True], [False, False]]
