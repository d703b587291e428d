"""Real runs for the reference to be compared with: the whole Trainer, in this process, a world of one rank."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.configs import run_config_of

Run = Callable[..., Path]


@pytest.fixture(scope="package")
def world() -> Iterator[None]:
    """A process group of this process alone."""
    import torch
    import torch.distributed as dist

    from megatrain.engine.zero.import_once import import_deepspeed

    deepspeed = import_deepspeed()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            patch.setenv(name, "1" if name == "WORLD_SIZE" else "0")
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
        yield
    dist.destroy_process_group()
    deepspeed.comm.comm.cdb = None
    torch.set_num_threads(threads)


@pytest.fixture
def train(world: None, memory_path: Path) -> Run:
    """Trains a config, given as sections, from its first step to its last; returns its run folder.

    ``stop``: a step after which the run ends, to be resumed by another start.
    """

    def trained(sections: dict[str, Any], stop: int | None = None) -> Path:
        sections = {"folder": str(memory_path / "runs"), "name": "run", **sections}
        if stop is not None:
            _start({**sections, "train": {**sections["train"], "steps": stop}})
        return _start(sections)

    return trained


def _start(sections: dict[str, Any]) -> Path:
    """One start of a run, as train/run.py makes it, in a process group that is there already."""
    from megatrain.config.derive import resolve
    from megatrain.config.rules.check import check
    from megatrain.data.feed.training import TrainingData
    from megatrain.data.feed.validation import validation_loader, validation_sets
    from megatrain.record.run_folder import RunFolder
    from megatrain.spec.derive import num_tokens
    from megatrain.train.loop import train
    from tests.layouts import build_engine

    asked = run_config_of(sections)
    assert (problems := check(asked, 1)) == [], problems
    config = resolve(asked, 1)
    RunFolder.of(config).prepare(config)
    engine, vocab = build_engine(config), num_tokens(config.model)
    validation = {name: validation_loader(d, config, 0, 1) for name, d in validation_sets(config, vocab).items()}
    try:
        assert train(config, engine, TrainingData(config, vocab), validation)
    finally:
        engine.close()
    return RunFolder.of(config).path
