"""A process that builds one engine after another keeps nothing of those that ended."""

import gc
import os
import weakref
from collections.abc import Iterator

import pytest

from tests.layouts import Layout, build_engine, global_batch, run_config
from tests.pool import Pool

NUM_ENGINES = 20


@pytest.fixture(scope="module")
def own_pool() -> Iterator[Pool]:
    """Workers that served no other test, whose engines may not have been closed."""
    workers = Pool(2)
    yield workers
    workers.close()


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def build_many(layout: Layout) -> tuple[list[int], int]:
    """Threads of this process after each engine's step, and how many of their models are left at the end."""
    threads, models = [], []
    config = run_config("llama", layout, model={"num_layers": 1})
    for _ in range(NUM_ENGINES):
        engine = build_engine(config)
        engine.train_step(global_batch(1, engine.mesh.coordinate("dp"), layout.dp), 1)
        engine.evaluate(global_batch(1, engine.mesh.coordinate("dp"), layout.dp))
        models.append(weakref.ref(engine.model))
        engine.close()
        threads.append(num_threads())
        del engine
    gc.collect()
    return threads, sum(model() is not None for model in models)


# one for each optimizer of DeepSpeed's, and a mesh whose groups are all of several ranks
@pytest.mark.parametrize("layout", [Layout(tp=2, zero_stage=0), Layout(dp=2, zero_stage=3)], ids=str)
def test_twenty_engines_leave_no_threads_and_no_models(own_pool: Pool, layout: Layout) -> None:
    for threads, num_models in own_pool.run(build_many, 2, layout):
        assert set(threads[1:]) == {threads[0]}
        assert num_models == 0
    for left in own_pool.run(num_threads, 2):  # of a world without groups of its own: gloo's three, the process's own
        assert left <= 8
