"""The pool of workers, shared by the whole run."""

from collections.abc import Iterator

import pytest

from tests.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Eight gloo workers, started when first used."""
    workers = Pool(8)
    yield workers
    workers.close()
