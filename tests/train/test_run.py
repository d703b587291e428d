"""A run as a whole, in a process that no launcher started."""

import os
from pathlib import Path

import pytest

from megatrain.config.schema import RunConfig
from tests.data.factory import make_dataset
from tests.layouts import Layout, run_config
from tests.pool import Pool
from tests.programs import LAUNCHER


def kernels_of_a_dry_run(config: RunConfig) -> bool:
    """Whether torch's deterministic kernels are in use once the run's step is made."""
    import deepspeed.comm.comm
    import torch

    from megatrain.train.run import run

    torch.distributed.destroy_process_group()
    deepspeed.comm.comm.cdb = None
    for name in LAUNCHER:
        os.environ.pop(name, None)
    try:
        assert run(config, dry=True)
        return torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(1)


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_run_has_deterministic_kernels_where_its_config_says_so(
    pool: Pool, tmp_path: Path, deterministic: bool
) -> None:
    data = {"train": {"data": {"path": str(make_dataset(tmp_path / "data", 1000, 64))}}}
    train = {"deterministic": deterministic, "steps": 1}
    config = run_config("llama", Layout(), model={"num_layers": 1}, data=data, train=train)
    config = config.model_copy(update={"folder": str(tmp_path / "runs")})
    assert pool.run(kernels_of_a_dry_run, 1, config) == [deterministic]
