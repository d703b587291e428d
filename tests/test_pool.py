"""The pool itself: what the tests of layouts stand on."""

import os
from collections.abc import Iterator

import pytest

from tests.pool import Pool, WorkerFailure


@pytest.fixture
def one() -> Iterator[Pool]:
    pool = Pool(1)
    yield pool
    pool.close()


def die() -> None:
    os._exit(3)


def test_a_worker_that_dies_is_named_and_replaced(one: Pool) -> None:
    with pytest.raises(WorkerFailure, match="rank 0 of 1 ended without an answer"):
        one.run(die, 1)
    assert one.run(abs, 1, -2) == [2]


def test_a_worker_that_raises_hands_over_its_traceback(one: Pool) -> None:
    with pytest.raises(WorkerFailure, match="invalid literal for int"):
        one.run(int, 1, "x")


def test_workers_that_hold_too_much_are_replaced(one: Pool) -> None:
    first = one.run(os.getpid, 1)
    assert one.run(os.getpid, 1) == first
    one.memory = 2**20
    one.run(os.getpid, 1)
    assert one.run(os.getpid, 1) != first
